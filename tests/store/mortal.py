"""A kernel that dies at a chosen call, for walks over every step of what `tests/crash.py` does not walk over."""

from __future__ import annotations

from tests.world import CarelessKernel


class Dies(BaseException):
    """The process is killed here."""


class Mortal(CarelessKernel):
    """Dies at one of the calls that change a disk."""

    left = 1 << 30

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Dies

    def create(self, path: str, mode: int) -> int:
        self._count()
        return super().create(path, mode)

    def rename(self, old: str, new: str) -> None:
        self._count()
        super().rename(old, new)

    def unlink(self, path: str) -> None:
        if self.left >= 0:
            super().unlink(path)
