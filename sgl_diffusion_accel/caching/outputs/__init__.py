"""Skips whole transformer calls."""
