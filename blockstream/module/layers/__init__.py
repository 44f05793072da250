"""Layers that compute from the form their weights have on disk.

In: a module and the entries of its weights; out: its layers, changed in class for as long as it streams.
"""
