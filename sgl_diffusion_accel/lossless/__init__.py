"""What is computed and cannot matter: text padding, and masks that hide nothing."""
