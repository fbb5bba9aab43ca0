"""The stream of keys that layers draw from is nnx.Rngs' own."""

import chex
import jax
import numpy as np
from flax import nnx

from mira_u_jax.rng import Stream


def test_a_stream_gives_the_keys_of_nnx():
    key = jax.random.key(3)
    ours, flax = Stream(key), nnx.Rngs(params=key)
    for _ in range(3):
        np.testing.assert_array_equal(jax.random.key_data(ours.params()), jax.random.key_data(flax.params()))
    drawn = [rngs.dropout() for rngs in (Stream(key), nnx.Rngs(dropout=key))]
    np.testing.assert_array_equal(*map(jax.random.key_data, drawn))


def test_a_module_has_the_parameters_that_nnx_would_draw():
    key = jax.random.key(0)
    made = [nnx.state(nnx.Linear(3, 4, rngs=rngs)) for rngs in (Stream(key), nnx.Rngs(params=key))]
    chex.assert_trees_all_equal(*made)
