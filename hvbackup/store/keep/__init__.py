"""Keeping: which points stay and why, and how the others are forgotten."""
