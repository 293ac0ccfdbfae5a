"""The store: chunks in packs, block maps, points, journals, and the views that read them.  One room for each matter:

format     what files hold, byte by byte: packs, block maps, points, run records, keys
index      where each chunk is: memory-mapped, immutable generations
chunks     blocks -> chunks -> packs, and back; the leases of writers; a disk at a moment, read-only
shelves    small sealed files in folders of their own: settings, holds, pins, tombstones, requests, pauses
journal    the ordered facts of a machine, and the moments they offer
keep       what stays, what goes and why; forgetting through the trash
reclaim    the only thing that removes data; copies what lives in sparse packs, joins cold blocks
check      what is damaged, who needs it, and how it heals
catalog    DuckDB over all of it: what `hvbackup sql` asks

`store.py` opens a store and commits points; `backend.py` is the place a store lives in.
"""
