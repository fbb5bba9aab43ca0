"""Checkpoints of a stage in DIR/checkpoints/<stage>, by orbax. Nothing but arrays is kept: the order needs no iterator."""

import pathlib

import jax
import orbax.checkpoint as ocp

from mira_u_jax.errors import UserError


def open_manager(workdir, stage: str, *, keep: int = 1) -> ocp.CheckpointManager:
    """The manager of a stage's checkpoints; the newest `keep` stay. Saving is asynchronous and atomic."""
    path = (pathlib.Path(workdir) / "checkpoints" / stage).resolve()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(path, options=options)


def save(manager: ocp.CheckpointManager, step: int, state):
    """Start saving `state` as `step`; the state may be donated to the next step at once. Again is a no-op."""
    if manager.latest_step() != step:
        manager.save(step, args=ocp.args.StandardSave(state))


def restore(manager: ocp.CheckpointManager, like):
    """The newest state, laid out as `like` (arrays, or ShapeDtypeStructs with shardings); None if there is none."""
    if manager.latest_step() is None:
        return None
    return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(jax.tree.map(abstract, like)))


def load_ema(workdir, like_ema) -> dict:
    """phi of a finished or running stage "train", as a tree like `like_ema` (ShapeDtypeStructs). UserError if none."""
    path = (pathlib.Path(workdir) / "checkpoints" / "train").resolve()
    if not path.is_dir():
        raise UserError(f"{path} does not exist: train in {workdir} first, with main")
    with ocp.CheckpointManager(path) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{path} holds no checkpoint yet: train in {workdir} first, with main")
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {"ema": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like_ema)}
        as_laid_out = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.PyTreeRestore(like, restore_args=as_laid_out, partial_restore=True)
        return manager.restore(step, args=args)["ema"]


def abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
