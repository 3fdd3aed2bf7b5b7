"""Text padding that a mask hides, and masks that hide nothing: which models, and how they are cut."""
