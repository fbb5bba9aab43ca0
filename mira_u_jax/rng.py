"""Randomness as a pure function of (seed, stream name, step): nothing to store, nothing to resume."""

import zlib

import jax


def named(key, name: str):
    """The sub-key of `key` for one purpose. Adding a purpose never shifts another one's numbers."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def per_example(key, count: int):
    """One key an example of the global batch, (count,): independent of how the batch is spread over devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.arange(count))
