"""Comparing a streamed run with a resident one, bit for bit.

In: a config; out: the first difference, or none.
"""
