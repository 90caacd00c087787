"""What the papers share: declarations of a study, the context of a measure, verdicts, the ledger, the look of figures."""
