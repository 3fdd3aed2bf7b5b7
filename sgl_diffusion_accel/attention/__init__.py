"""Attention backends: named, checked, or chosen by measuring."""
