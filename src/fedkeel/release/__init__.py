"""Versions of a model: what two of them differ in, and whether who works with the one can work with the other."""
