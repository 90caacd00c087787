"""Paper B: gradient descent happens in a tiny subspace."""
