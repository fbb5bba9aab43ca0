"""Where arrays lie: one mesh axis `data` over all devices of all processes. Models and losses know nothing of it."""

import contextlib
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mira_u_jax.config import get

WHOLE_BELOW = 2**12  # elements; to part a smaller array costs more than it saves


def use_cores(config):
    """Make each CPU core that divides the batches a device of its own. To be called before anything touches a device.

    XLA parallelises few of an operation's kinds over cores; two devices run the same program on half of the batch each, and
    keep more of it in their caches. With mesh.cpu_devices=auto, what JAX or XLA was told about the number of devices
    stands, and so does what a process has begun with. Accelerators are none of this function's business.
    """
    wanted = config.mesh.cpu_devices
    if wanted != "auto":
        jax.config.update("jax_num_cpu_devices", wanted)
        return
    if jax.config.jax_num_cpu_devices != -1 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    fitting = [n for n in range(1, cpu_count() + 1) if not misfit(config, n)]
    with contextlib.suppress(RuntimeError):  # devices are in use already
        jax.config.update("jax_num_cpu_devices", fitting[-1])


def misfit(config, devices: int) -> str:
    """The batch that so many devices cannot part, "key: what it must be"; "" where all fit.

    CutMix partners share a device.
    """
    units = {"train.batch": 2 * devices} | ({"mim.batch": devices} if config.mim.steps else {})
    wrong = [f"{key}: it must be a multiple of {unit}" for key, unit in units.items() if get(config, key) % unit]
    return wrong[0] if wrong else ""


def cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_mesh(count: int | None = None) -> Mesh:
    """All devices, or the first `count`, on the axis `data`, those of a process beside each other.

    Auto axes: XLA places the collectives.
    """
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))[:count]
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array: parameters, and data that fit."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis, the global batch, is spread over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def layout(tree, mesh: Mesh, *, fsdp: bool):
    """The sharding of each leaf of a parameter or state tree: whole everywhere, or with `fsdp` spread by the rule.

    The rule reads the shape alone, so that a parameter, its average and its moments lie alike: the longest axis that the
    devices divide, the last of equals; what has none, or is small, stays whole.
    """

    def rule(leaf):
        fitting = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
        if not fsdp or not fitting or leaf.size < WHOLE_BELOW:
            return replicated(mesh)
        longest = max(fitting, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(rule, tree)


def gathering(step, mesh: Mesh):
    """`step` on a state spread by FSDP: inside, theta and phi are whole, each array gathered where it is first used.

    Without it XLA spreads activations after the parameters, by heads and channels, and copies them to and fro.
    """

    def gathered(state, *inputs):
        whole = jax.lax.with_sharding_constraint({"params": state.params, "ema": state.ema}, replicated(mesh))
        return step(state.replace(**whole), *inputs)

    return gathered


def share(mesh: Mesh, batch: int) -> slice:
    """Which part of a global batch lies on this process's devices."""
    places = batched(mesh).addressable_devices_indices_map((batch,)).values()
    return slice(min(p[0].start or 0 for p in places), max(batch if p[0].stop is None else p[0].stop for p in places))


def spread(tree, mesh: Mesh, batch: int):
    """The global batch of which this process has its share in NumPy arrays, (share of b, ...) each."""
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(batched(mesh), x, (batch, *x.shape[1:])), tree
    )


def everywhere(tree, mesh: Mesh):
    """The same NumPy arrays of all processes, whole on every device."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(replicated(mesh), x, x.shape), tree)
