"""Arithmetic shared by the rules of several kinds: the Gram matrix and the sorting network. Imports nothing of ours."""
