"""The pure core: what stays, where each load goes, when it happens.

In: a schedule, costs and bytes; out: a `Plan`. No thread, no clock, no file, no torch.
"""
