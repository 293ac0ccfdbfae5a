"""The catalog: DuckDB over everything in a store; a cache that people ask in SQL, and nothing else relies on."""
