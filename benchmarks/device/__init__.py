"""What the device's tiers reach on a real device, each part in a process of its own."""
