"""Speed of this package and of other libraries, side by side in one process on the same data."""
