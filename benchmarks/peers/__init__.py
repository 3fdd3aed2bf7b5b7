"""The peers, each in its own file; one that is not installed is left out."""
