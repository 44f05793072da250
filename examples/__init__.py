"""YAML files that `blockstream run NAME` finds wherever it is called."""
