"""Experiments: pure functions from finished runs to tidy tables, one module a paper."""
