"""Mixers: rows into fewer or tamer rows before the reducer, `(U, w) -> (U, w)`. None is built in yet."""
