"""Distil where a teacher looks while it reasons (MoLSAKI, EMNLP 2025) without storing attention maps."""

__version__ = "0.1.0"
