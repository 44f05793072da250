"""What this machine has and may give: memory, limits, processors, disk."""
