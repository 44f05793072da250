"""What people see of a run: progress, tables, pages, and the figures in them.

In: plain values and ledgers; out: report.json, text and pictures.
"""
