"""Reclaim: chunks that nothing needs are removed, others copied into denser packs first."""
