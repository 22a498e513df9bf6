"""Screens: rows against the cohort, `(cohort, state) -> {row: (reason, score)}`. None is built in yet."""
