"""Reading checkpoints: headers to entries, entries to extents, extents to memory. Bytes only."""
