"""What is computed again and again with one result, or for nothing."""
