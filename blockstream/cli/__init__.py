"""The `blockstream` command: one file a command."""
