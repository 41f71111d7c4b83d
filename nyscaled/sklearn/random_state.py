"""Random numbers of scikit-learn's estimators, from which JAX's follow."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Key
from sklearn.utils import check_random_state

RandomState = int | np.random.RandomState | None


def as_key(random_state: RandomState) -> Key[Array, ""]:
    """Return a PRNG key that follows from scikit-learn's `random_state`.

    Args:
        random_state: an integer; a generator, from which one number is drawn; or None for NumPy's
            global generator.

    Examples:
        >>> bool(as_key(0) == as_key(0))
        True
    """
    return jax.random.key(check_random_state(random_state).randint(2**31 - 1))
