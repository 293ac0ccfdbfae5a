"""hvbackup: continuous backup of virtual machines, and any moment of them back.

A disk's history is an append-only list of facts, and a disk image is a fold over that list.  Capture writes facts;
everything else reads a view at a moment.
"""

from __future__ import annotations

__version__ = "0.1.0"
