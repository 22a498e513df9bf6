"""The live page of a run: an incremental reader of its ledger, and a small server. Nothing here writes the record."""
