"""Where arrays lie: one mesh axis `data` over all devices. Models and losses know nothing of it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all processes on the axis `data`. Auto axes: XLA places the collectives."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array: parameters, and data that fit."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis, the global batch, is spread over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))
