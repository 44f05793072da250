"""Figures about runs: what one came to, what the next will take, what more memory would buy."""
