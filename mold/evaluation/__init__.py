"""What a model answers, and where it looks."""
