"""The `blockstream` command: one file a command.

In: a command line; out: text and an exit code.
"""
