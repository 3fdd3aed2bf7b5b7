"""Attention backends: what there is, what each needs, how each is called."""
