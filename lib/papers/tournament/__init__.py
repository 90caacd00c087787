"""All optimisers at their own best learning rates: our own study."""
