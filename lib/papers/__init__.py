"""The papers that are rebuilt on the library: one folder each, and what they share in ``common``."""
