"""Writers for experiment trackers, fed by the ledger of a run alone. Nothing here writes the record."""
