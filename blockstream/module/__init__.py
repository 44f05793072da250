"""What is done to a torch module: built empty, cut into parts, matched with a checkpoint, bound to memory.

In: a module and a checkpoint; out: parts, layouts and bindings.
"""
