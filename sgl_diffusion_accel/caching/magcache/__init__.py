"""MagCache."""
