"""Bytes a user asks for, and what weights may take now.

In: an amount and what the system says; out: a ceiling and a verdict.
"""
