"""Chooses among the other patches, and says beforehand what each of them can do: `apply_auto`, `check_pipeline`."""
