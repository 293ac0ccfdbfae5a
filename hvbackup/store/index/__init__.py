"""The index: where each chunk is, made from the footers of packs and only from them."""
