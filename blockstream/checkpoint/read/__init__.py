"""Reading checkpoints, bytes only.

In: folders of weights; out: entries by name, layouts of segments, their bytes in memory.
"""
