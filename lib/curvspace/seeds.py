"""Seeds of all that is drawn at random."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from a run's seed, a purpose and a counter: ``derived_seed(0, "order", epoch)``.

    Every random draw of a run comes from a generator seeded so: order, initialisation, augmentation and dropout
    never share a stream, and the place in training alone says what is drawn, so that a resumed run needs no
    generator state to continue bit for bit.
    """
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
