"""The journal: the ordered facts of all disks of a machine, in logs and sealed segments, and the moments they offer."""
