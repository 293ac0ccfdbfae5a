"""Check: what is damaged and who needs it, what the records say of the whole store, and how it is mended."""
