"""Figures: pure functions ``f(tables, style, **spec) -> (Figure, DataFrame drawn)``; no torch here."""
