"""A run from its config to its folder.

In: YAML and `--set`; out: files, resumed where an earlier run stopped.
"""
