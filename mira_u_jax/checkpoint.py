"""Checkpoints of a stage in DIR/checkpoints/<stage>, by orbax. Nothing but arrays is kept: the order needs no iterator.

Saving is asynchronous and atomic: a process killed in the middle leaves a folder that nobody reads. What a disk does later
is found by checksums, taken of the arrays when they are saved and again when they are restored; then the newest intact
checkpoint is taken, and the run says so.
"""

import errno
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mira_u_jax import cluster
from mira_u_jax.errors import UserError


class Manager(ocp.CheckpointManager):
    """orbax's manager, which would ask for a preemption too; JAX allows one question a step, and that is the loop's."""

    def reached_preemption(self, step: int) -> bool:
        return False


def open_manager(workdir, stage: str, *, keep: int = 2) -> Manager:
    """The manager of a stage's checkpoints; the newest `keep` stay."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True, lightweight_initialize=True
    )
    return Manager(folder(workdir, stage), options=options)


def begun(workdir, stage: str) -> bool:
    """Whether a stage has a checkpoint, intact or not, by the names in its folder: no process waits for another."""
    path = folder(workdir, stage)
    return path.is_dir() and any(step.name.isdigit() for step in path.iterdir())


def folder(workdir, stage: str) -> pathlib.Path:
    return (pathlib.Path(workdir) / "checkpoints" / stage).resolve()


def save(manager: Manager, step: int, state):
    """Start saving `state` as `step`; the state may be donated to the next step at once. Again is a no-op."""
    if manager.latest_step() != step:
        manager.save(step, args=ocp.args.StandardSave(state), custom_metadata={"checksums": checksums(state)})


def restore(manager: Manager, like):
    """The newest intact state, laid out as `like` (arrays, or ShapeDtypeStructs with shardings); None if there is none.

    Damaged ones that are newer are removed: the run makes them again. Raises OSError when none is intact.
    """
    like = jax.tree.map(abstract, like)
    load = lambda step: manager.restore(step, args=ocp.args.StandardRestore(like))  # noqa: E731
    step, state = newest_intact(manager, load, anywhere=cluster.anywhere)
    for newer in [s for s in manager.all_steps() if step is not None and s > step]:
        manager.delete(newer)
    return state


def load_ema(workdir, like_ema) -> dict:
    """phi of a finished or running stage "train", as a tree like `like_ema` (ShapeDtypeStructs). UserError if none.

    By this process alone, onto its first device, whatever the others do.
    """
    path = folder(workdir, "train")
    if not path.is_dir():
        raise UserError(f"{path} does not exist: train in {workdir} first, with main")
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}")
    options = ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True, multiprocessing_options=alone)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {"ema": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like_ema)}
    as_laid_out = ocp.checkpoint_utils.construct_restore_args(like)
    args = ocp.args.PyTreeRestore(like, restore_args=as_laid_out, partial_restore=True)
    with Manager(path, options=options) as manager:
        step, tree = newest_intact(manager, lambda step: manager.restore(step, args=args))
    if step is None:
        raise UserError(f"{path} holds no checkpoint yet: train in {workdir} first, with main")
    return tree["ema"]


def newest_intact(manager: Manager, load, *, anywhere=bool) -> tuple[int | None, Any]:
    """(step, load(step)) of the newest checkpoint whose arrays are those that were saved; (None, None) if there is none.

    anywhere: cluster.anywhere where all processes load together, so that what one of them cannot read all pass over. Says
    which ones it passes over. Raises OSError when there are some and none is intact, as a run never starts again in silence,
    and what the machine, not the file, is to blame for.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        wrong, blameless = "", None
        try:
            tree, metadata = load(step), manager.metadata(step).custom_metadata
        except Exception as error:  # noqa: BLE001 - whatever a damaged file makes orbax raise
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            blameless = error if of_the_machine(error) else None
        elsewhere = anywhere(wrong)
        if blameless:
            raise blameless
        if elsewhere and not wrong:  # before the checksums, for which all processes must ask
            wrong = "another process cannot read it"
        wrong = wrong or differing(tree, metadata)
        if not wrong:
            return step, tree
        print(f"checkpoint {manager.directory / str(step)} is damaged ({wrong[:150]}); looking at older ones", flush=True)
    if steps:
        raise OSError(f"none of the checkpoints in {manager.directory} is intact; remove it to start this stage anew")
    return None, None


def of_the_machine(error: Exception) -> bool:
    """Whether an error says nothing about the file that was read: no right to it, no memory, a disk that does not answer."""
    passing = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
    return (
        isinstance(error, (MemoryError, PermissionError)) or getattr(error, "errno", None) in passing
        or "RESOURCE_EXHAUSTED" in str(error)
    )


def differing(tree, metadata) -> str:
    """What of `tree` is not as it was saved, "" where all is; of a checkpoint without checksums nothing can be said."""
    saved = (metadata or {}).get("checksums", {})
    wrong = [name for name, value in checksums(tree).items() if saved.get(name, value) != value]
    return f"{wrong[0]} is not what was saved" if wrong else ""


def checksums(tree) -> dict[str, int]:
    """{path of leaf: sum over its words of word x (2 place + 1), modulo 2^64}, the same however the leaf is spread.

    The factors are odd, so that a change of any one word is seen. Every process must ask.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = np.array([local_sum(leaf) for _, leaf in leaves], np.uint64)
    if any(not leaf.is_fully_addressable for _, leaf in leaves):
        halves = multihost_utils.process_allgather(sums.view(np.uint32))  # JAX has no 64 bits unless asked
        sums = np.ascontiguousarray(halves).view(np.uint64).sum(0, dtype=np.uint64)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return dict(zip(names, sums.tolist(), strict=True))


def local_sum(x: jax.Array) -> int:
    """This process's share of a leaf's checksum: each part of it is counted by the one process that holds its first copy."""
    places = np.arange(x.size, dtype=np.uint64).reshape(x.shape)
    total = np.zeros((), np.uint64)
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            words = np.ascontiguousarray(shard.data).view(f"u{x.dtype.itemsize}").reshape(shard.data.shape)
            total += (words.astype(np.uint64) * (2 * places[shard.index] + 1)).sum(dtype=np.uint64)
    return int(total)


def abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
