"""What one run gave: its output as a tensor, how near it is to the unpatched one, which blocks it computed."""
