"""What a list may name: the catalog, and titles as other models write them."""
