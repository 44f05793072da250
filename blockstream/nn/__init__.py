"""The torch adapter: the only place of the package that imports torch."""
