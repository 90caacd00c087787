"""Paper A: Newton's method in the class-gradient subspace."""
