"""Chunks: blocks are deduplicated, compressed, encrypted and packed, under a writer's lease; and read back, verified."""
