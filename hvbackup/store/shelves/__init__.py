"""Shelves: small sealed files that say what a store demands, what must stay, who reads, and what is being forgotten."""
