"""Pooled attention over token spans, its exact gradient, layer mixtures and their loss."""
