"""The fixtures of the store's tests serve here too."""

from __future__ import annotations

from tests.store.conftest import ram

__all__ = ["ram"]
