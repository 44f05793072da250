"""What plugins may add and how they are found.

In: entry points and names; out: choices, blamed by name when they fail.
"""
