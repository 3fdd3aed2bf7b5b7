"""What users switch on together, pair by pair."""
