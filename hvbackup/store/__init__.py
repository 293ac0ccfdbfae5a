"""The store: chunks in packs, block maps, points, and the views that read them.

format     byte layouts shared by every file
keys       the secrets of a store, and how they are wrapped
sealed     small signed files: points, runs
pack       files of many chunks
index      where each chunk is: memory-mapped, immutable generations
blockmap   block number -> chunk id, as a tree of pages
writer     blocks -> chunks -> packs
view       a disk at a moment, read-only
catalog    DuckDB over all of it: what `hvbackup sql` asks
check      what is damaged, and who needs it
store      opens the rest and commits points
"""
