"""The loop: data, stages, resume, log, pictures. No maths; that is steps.py."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time

import jax
import numpy as np

from mira_u_jax import checkpoint, data, figures, metrics, sharding, steps
from mira_u_jax import config as configuration
from mira_u_jax.errors import UserError
from mira_u_jax.logger import Logger


def run(config, workdir):
    """Every stage of a checked configuration, from wherever `workdir` stands to the end. Returns the final TrainState."""
    mesh = sharding.make_mesh()
    for key, unit in (("train.batch", 2 * mesh.size), ("mim.batch", mesh.size)):  # CutMix partners share a device
        if mesh.size > 1 and configuration.get(config, key) % unit:
            raise UserError(f"config key {key}: it must be a multiple of {unit} on {mesh.size} devices")
    dataset = data.training_set(config)
    configuration.save(config, workdir, facts())
    print(f"{config.dataset}: {dataset.summary}", flush=True)
    run = Run(config, pathlib.Path(workdir), mesh, dataset)

    names = steps.network_names(config)
    params = steps.init_params(names, "train", config, run.key)
    targets = tuple(name for name in steps.mim_targets(config) if name in names)
    epoch = -(-len(dataset.unlabelled) // config.mim.batch)
    mim_steps = configuration.steps_of(config.mim.steps, epoch=epoch, key="mim.steps")
    if mim_steps and targets:
        pretrained = run.pretrain(targets, mim_steps, epoch)
        for name in targets:
            params[name]["encoder"] = pretrained.params[name]["encoder"]
    state = run.train(names, params)
    figures.training_curves(workdir)
    return state


class Run:
    """What the stages of one run share: the configuration, the mesh, the resident data and the key."""

    def __init__(self, config, workdir: pathlib.Path, mesh, dataset: data.TrainingSet):
        self.config, self.workdir, self.mesh, self.dataset = config, workdir, mesh, dataset
        everywhere = sharding.replicated(mesh)
        self.key = jax.device_put(jax.random.key(config.seed), everywhere)
        self.resident = jax.device_put({"image": dataset.image, "mask": dataset.mask}, everywhere)

    def pretrain(self, names, total: int, epoch: int) -> steps.TrainState:
        """Stage 1, masked image modelling on the pool, `total` steps."""
        config, cfg = self.config, self.config.mim
        schedule = steps.make_schedule(config.optim, total, lr=cfg.lr, schedule="cosine")
        tx = steps.make_optimizer(config.optim, names, schedule)
        networks = steps.make_networks(names, "pretrain", config)
        order = data.order(config.seed, "pretrain", self.dataset.unlabelled)
        return self.stage(
            "pretrain", total=total, epoch=epoch, images=cfg.batch,
            state=steps.init_state(steps.init_params(names, "pretrain", config, self.key), tx, config.optim),
            step_fn=functools.partial(steps.pretrain_step, networks=networks, tx=tx, config=config),
            index_at=lambda step: data.batch_at(order, step, cfg.batch),
        )

    def train(self, names, params) -> steps.TrainState:
        """Stage 2, semi-supervised training. An epoch is one pass over the pool."""
        config, cfg = self.config, self.config.train
        epoch = -(-len(self.dataset.unlabelled) // cfg.batch)
        total = configuration.steps_of(cfg.steps, epoch=epoch, key="train.steps")
        if not total:
            raise UserError("config key train.steps: the stage needs at least one step")
        schedule = steps.make_schedule(config.optim, total, lr=config.optim.lr, schedule=config.optim.schedule)
        tx = steps.make_optimizer(config.optim, names, schedule)
        networks = steps.make_networks(names, "train", config)
        labelled, validate = self.dataset.labelled, None
        if config.optim.schedule == "plateau":
            labelled, validate = self.plateau(networks["student"], epoch, total)
        orders = {
            "labelled": data.order(config.seed, "labelled", labelled),
            "unlabelled": data.order(config.seed, "unlabelled", self.dataset.unlabelled),
        }
        if config.loss.beta == 0:
            del orders["unlabelled"]
        return self.stage(
            "train", total=total, epoch=epoch, images=len(orders) * cfg.batch,
            state=steps.init_state(params, tx, config.optim),
            step_fn=functools.partial(steps.train_step, networks=networks, tx=tx, config=config, steps=total, epoch=epoch),
            index_at=lambda step: {name: data.batch_at(order, step, cfg.batch) for name, order in orders.items()},
            after=validate, draw=figures.training_figure(self, networks, labelled, steps=total),
        )

    def plateau(self, network, epoch: int, total: int):
        """The plateau schedule's validation set, cut from the labelled budget, and the function that feeds it."""
        cfg = self.config.optim.plateau
        held = max(round(cfg.holdout * len(self.dataset.labelled)), 1)
        if held >= len(self.dataset.labelled):
            raise UserError("config key optim.schedule=plateau: one labelled image cannot also validate; use cosine")
        shuffled = np.random.default_rng(self.config.label_seed).permutation(self.dataset.labelled)
        labelled, held_out = np.sort(shuffled[held:]), np.sort(shuffled[:held])
        every = max(configuration.steps_of(cfg.every, epoch=epoch, total=total, key="optim.plateau.every"), 1)
        predict = jax.jit(functools.partial(steps.eval_step, network=network))
        transform = steps.make_plateau(self.config.optim)
        truth = self.dataset.mask[held_out] > 127

        def validate(step, state):
            if step % every:
                return state, {}
            found = np.concatenate(
                [jax.device_get(predict(state.ema["student"], self.dataset.image[held_out[i : i + 1]])) > 0
                 for i in range(len(held_out))]
            )
            dice = metrics.scores([metrics.confusion(p, t) for p, t in zip(found, truth, strict=True)])["dice"].mean()
            _, plateau = transform.update({}, state.plateau, value=1 - np.float32(dice))
            plateau = jax.device_put(plateau, sharding.replicated(self.mesh))
            return state.replace(plateau=plateau), {"validation_dice": float(dice), "lr_scale": float(plateau.scale)}

        return labelled, validate

    def stage(self, name, *, total, epoch, images, state, step_fn, index_at, after=None, draw=None) -> steps.TrainState:
        """Run one stage to `total` steps, from its newest checkpoint if there is one."""
        cfg = self.config.train
        every = {
            what: max(configuration.steps_of(cfg[f"{what}_every"], epoch=epoch, total=total, key=f"train.{what}_every"), 1)
            for what in ("log", "save", "figures")
        }
        state = jax.device_put(state, sharding.replicated(self.mesh))
        step_fn = jax.jit(step_fn, donate_argnums=0)
        with checkpoint.open_manager(self.workdir, name, keep=cfg.keep) as manager:
            state = checkpoint.restore(manager, state) or state
            first = int(state.step)
            if first:
                print(f"{name}: going on from step {first} of {total}", flush=True)
            logger = Logger(self.workdir, name, step=first, steps=total, images_per_step=images)
            started = time.perf_counter()
            for step in range(first, total):
                index = jax.device_put(index_at(step), sharding.batched(self.mesh))
                state, measured = step_fn(state, self.resident, index, self.key)
                logger.add(measured)
                done, last = step + 1, step + 1 == total
                if after is not None:
                    state, validated = after(done, state)
                    if validated:
                        logger.write(done, "validation", validated)
                if done % every["log"] == 0 or done % every["save"] == 0 or last:
                    logger.flush(done)  # before any save: what is not finite is not kept
                if done % every["save"] == 0 or last:
                    checkpoint.save(manager, done, state)
                if draw and (done % every["figures"] == 0 or last):
                    draw(done, state)
            manager.wait_until_finished()
            if first < total:
                print(f"{name}: {total - first} steps in {time.perf_counter() - started:.0f} s", flush=True)
        return state


def facts() -> dict:
    """What a result must say about where it comes from: commit, versions, hardware."""
    root = pathlib.Path(__file__).parent.parent

    def git(*args):
        try:
            return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True).stdout.strip()
        except OSError:  # no git on this machine
            return ""

    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")}
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    return {
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else ""),
        "versions": versions | {"python": platform.python_version()},
        "hardware": f"{jax.device_count()} x {device.platform} ({kind}), {cpu_count()} CPU cores",
    }


def cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
