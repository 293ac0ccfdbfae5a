"""Which of the blocks that a hypervisor calls unchanged are read all the same: trackers can lie.

Some are drawn at random.  One is chosen: a disk that was shrunk and grown back between two captures has lost its end, and QEMU's
bitmaps say nothing of it (measured with 7.2, qcow2 and raw).  What came back reads as zeroes, so a lost end is seen at the
last block that had data; behind it nothing could be lost.
"""

from __future__ import annotations

import random

import numpy as np

from hvbackup import extents
from hvbackup.extents import Spans
from hvbackup.store.format.blockmap import BlockMap


def sampled(unchanged: Spans, block: int, count: int, rng: random.Random) -> Spans:
    """At most `count` whole blocks out of a set of them.  Pure but for `rng`."""
    sizes = -(-unchanged[:, 1] // block)
    total = int(sizes.sum())
    picked = np.array(sorted(rng.sample(range(total), min(count, total))), np.int64)
    ends = np.cumsum(sizes)
    row = np.searchsorted(ends, picked, side="right")
    starts = unchanged[row, 0] + (picked - (ends[row] - sizes[row])) * block
    lengths = np.minimum(block, unchanged[row].sum(axis=1) - starts)
    return extents.spans(np.column_stack([starts, lengths]))


def witness(base: BlockMap, unchanged: Spans, block: int) -> Spans:
    """The last block with data that should be as it was: if it is, no end of the disk was lost meanwhile."""
    for first, ids in base.leaves_backwards() if len(unchanged) else []:
        starts = (first + np.flatnonzero(ids.any(axis=1))) * block
        row = np.searchsorted(unchanged[:, 0], starts, side="right") - 1
        ends = unchanged[row].sum(axis=1)
        found = np.flatnonzero((row >= 0) & (starts < ends))
        if len(found):
            last = found[-1]
            return extents.spans([(starts[last], min(block, ends[last] - starts[last]))])
    return extents.EMPTY
