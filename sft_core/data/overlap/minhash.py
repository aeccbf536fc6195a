"""MinHash signatures of sets (Broder 1997, On the resemblance and containment of documents).

The permutations are datasketch's scheme "affine32" under a fixed seed: the same in every process.
"""

from __future__ import annotations

import numpy as np

SEED = 1
_ELEMENTS_AT_ONCE = 4096  # bounds the memory for a set of any size: 2 MiB at 128 permutations


def sign(sets: list[np.ndarray], num_permutations: int) -> np.ndarray:
    """uint32, shape (sets, permutations). sets: uint32 hashes, shape (elements,) each, in any order."""
    from datasketch import MinHash

    empty = MinHash(num_permutations, seed=SEED, hashfunc=int, scheme="affine32")
    signatures = np.empty((len(sets), num_permutations), np.uint32)
    for number, elements in enumerate(sets):
        sketch = empty.copy()
        for start in range(0, len(elements), _ELEMENTS_AT_ONCE):
            sketch.update_batch(elements[start : start + _ELEMENTS_AT_ONCE].tolist())
        signatures[number] = sketch.digest()
    return signatures
