"""Names that every doctest may use."""

import jax
import jax.numpy as jnp
import optax
import pytest


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, object]) -> None:  # pyright: ignore[reportUnusedFunction]
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax)
