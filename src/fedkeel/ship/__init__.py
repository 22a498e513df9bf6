"""What a run leaves behind: its directory, ledger, checkpoints, model card and report. Imports core only."""
