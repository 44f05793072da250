"""Writing checkpoints, atomically and past the page cache, bytes only.

In: a checkpoint to pack, or shapes to fill at random; out: files.
"""
