"""Norms and distances between rows, right to float32 for any finite rows."""
