"""Formats: what the files of a store hold, byte by byte.  `docs/format.md` says the same for strangers."""
