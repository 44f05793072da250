"""Running a plan: the compute side and the loader thread around one scheduler.

In: a plan and a store; out: handles and a ledger.
"""
