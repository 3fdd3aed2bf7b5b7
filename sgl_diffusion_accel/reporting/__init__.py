"""What all reports share: tables, the look of figures, the spread of repeated timings."""
