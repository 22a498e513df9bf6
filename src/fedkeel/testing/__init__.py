"""The laws of each kind of rule, public: `check("reducer", build("reducer", "my_rule"))` runs them on your own rule.

A law is a plain function that takes a built rule and raises `AssertionError` with the counterexample in words: a law
of a kind, or of the rules of a kind that claim a trait. `@law(kind)` and `@law(kind, trait)` add one; the modules here
hold those of one kind each.
"""

from fedkeel.testing import (
    attacks,
    codecs,
    contributions,
    corrections,
    mechanisms,
    mixers,
    objectives,
    optimisers,
    reducers,
    row_transforms,
    screens,
    selectors,
    server_optimisers,
    weighers,
)
from fedkeel.testing.harness import LAWS, Law, check, cohort, hold, law, laws, near, repeatable, rows, same, sample

__all__ = [
    "LAWS",
    "Law",
    "attacks",
    "check",
    "codecs",
    "cohort",
    "contributions",
    "corrections",
    "hold",
    "law",
    "laws",
    "mechanisms",
    "mixers",
    "near",
    "objectives",
    "optimisers",
    "reducers",
    "repeatable",
    "row_transforms",
    "rows",
    "same",
    "sample",
    "screens",
    "selectors",
    "server_optimisers",
    "weighers",
]
