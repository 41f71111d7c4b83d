"""Claims are made in float64; those on float32 ask for it by dtype."""

import jax

jax.config.update("jax_enable_x64", True)
