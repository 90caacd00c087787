"""A measure that leans on one module of the library."""

from curvspace.subspace import gradient_fraction


def spectrum(context, k):
    return gradient_fraction(context, k)


def unused(context):
    return context
