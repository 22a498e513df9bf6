"""The release gate: a run's model is judged by rules, and let into a registry or blocked, with the reasons told."""
