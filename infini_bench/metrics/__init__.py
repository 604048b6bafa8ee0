"""Pure functions from counts and texts to numbers with intervals. No torch, no files."""
