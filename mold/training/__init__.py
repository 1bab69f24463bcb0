"""Training a student."""
