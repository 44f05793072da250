"""Layers that compute from the form their weights have on disk."""
