"""Paper D: negative eigenvalues of the Hessian."""
