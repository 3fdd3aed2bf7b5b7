"""Designs: which steps of a run are computed, with which weights, and what error is to be expected."""
