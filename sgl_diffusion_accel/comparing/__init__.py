"""Compares patches with the unpatched pipeline: how much faster, and what it costs in quality."""
