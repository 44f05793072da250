"""Writing checkpoints: packs, random ones of full size, atomically and past the page cache. Bytes only."""
