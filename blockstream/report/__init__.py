"""What people see of a run: progress, tables. Reads plain values and ledgers only."""
