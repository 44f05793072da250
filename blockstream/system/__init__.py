"""What this machine has and may give: memory, limits, processors, disk.

In: files of the system and short measurements; out: bytes, speeds, a cache folder.
"""
