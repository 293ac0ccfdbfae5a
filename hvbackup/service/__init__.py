"""The verbs, as functions: what the command line (and every other skin) calls.

session      one invocation: where things are, which keys, how to open the store
stores       init, key
backup       backup, and which disks of a machine
protection   protect, tag: workers of continuous protection
timeline     timeline: what a journal offers
look         points, status, sql: what is there
recovery     map, restore, boot, discard
retention    prune, forget, hold, holds, release, approve, settings
reclaim      reclaim
audit        audit: who did what, and whether the records are whole
guestfiles   files: what is inside the disks of a machine
upkeep       check, parity, regroup
benchmark    this machine's ceilings, and what the pipeline reaches
shapes       what results look like as JSON: the same names everywhere

Importing this package costs nothing; its modules import what they need, so a skin imports them when a verb is chosen.
"""
