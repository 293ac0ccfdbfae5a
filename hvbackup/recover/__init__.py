"""Ways back: every one of them reads a `DiskView`, and none knows how its bytes came in.

restore   to raw and qcow2 files, block devices and NBD exports
export    a view as a read-only NBD export
browse    the files inside a disk: partitions, file systems, folders, bytes
boot      a machine on a qcow2 overlay over such an export
"""
