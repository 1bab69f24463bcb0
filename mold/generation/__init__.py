"""A teacher's rationales and key words."""
