"""Memory of a device as a tier above host memory: arenas, fences, copies, what a device may hold.

In: an engine that brings segments into host memory; out: a store of the engine above it, whose handles lie
in the device's memory.
"""
