"""Skips a span of blocks inside a transformer."""
