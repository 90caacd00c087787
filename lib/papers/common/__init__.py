"""What the papers share: declaring a study, a measure's context, verdicts, the ledger, the look of figures."""
