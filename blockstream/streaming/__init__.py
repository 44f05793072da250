"""Streaming modules: sessions, their stages and plans.

In: modules and a budget; out: modules ready to be called.
"""
