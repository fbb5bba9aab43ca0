"""Randomness as a pure function of (seed, stream name, step): nothing to store, nothing to resume."""

import typing
import zlib

import jax
from flax import nnx


def named(key, name: str):
    """The sub-key of `key` for one purpose. Adding a purpose never shifts another one's numbers."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def per_example(key, count: int):
    """One key an example of the global batch, (count,): independent of how the batch is spread over devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.arange(count))


class Stream:
    """The n-th call of either method gives fold_in(key, n): the keys of nnx.Rngs, for modules built or called under a trace.

    The count is Python's. nnx.Rngs keeps it in a Variable, and flax looks up the sharding of each new value of a Variable,
    for which JAX searches all that was traced so far: a third of the time of tracing a step.
    """

    def __init__(self, key):
        self.key, self.count = key, -1

    def params(self):
        self.count += 1
        return jax.random.fold_in(self.key, self.count)

    dropout = params


def stream(key) -> nnx.Rngs:
    """A Stream in the place of nnx.Rngs, of which layers need no more than these two methods."""
    return typing.cast(nnx.Rngs, Stream(key))
