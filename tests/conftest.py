"""Settings of the whole suite: CPU, and no broadcasting by accident."""

import os

# A machine with an accelerator runs the others by JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
