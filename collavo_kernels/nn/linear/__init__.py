"""Linear layers with a frozen 4-bit base and several adapters."""
