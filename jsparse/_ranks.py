"""Arrays of different ranks together, as NumPy has it, whatever the application allows.

``jax_numpy_rank_promotion`` is for the application's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def promotes_ranks[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """``function``, in which arrays of fewer axes broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> with jax.numpy_rank_promotion("raise"):
        ...     promotes_ranks(jnp.add)(jnp.ones((2, 3)), jnp.ones(3)).shape
        (2, 3)
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped
