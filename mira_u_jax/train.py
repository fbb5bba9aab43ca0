"""The loop: data, stages, resume, log, pictures. No maths; that is steps.py."""

import functools
import importlib.metadata
import itertools
import pathlib
import platform
import subprocess
import time

import jax
import numpy as np

from mira_u_jax import checkpoint, cluster, data, figures, initial, learned, metrics, sharding, steps, trained
from mira_u_jax import config as configuration
from mira_u_jax.errors import Preempted, UserError
from mira_u_jax.logger import Logger
from mira_u_jax.preemption import Notice


def run(config, workdir):
    """Every stage of a checked configuration, from wherever `workdir` stands to the end. Returns the final TrainState."""
    mesh = sharding.make_mesh()
    if key := sharding.misfit(config, mesh.size):
        raise UserError(f"config key {key} on {mesh.size} devices")
    goes_on = checkpoint.begun(workdir, "train")  # with weights of its own; asked before any process can save
    begins_with = initial.check(config) if config.files.init and not goes_on else learned.NOTHING
    dataset = data.training_set(config)
    if cluster.first():
        sizes = {"images": len(dataset.unlabelled), "labelled": len(dataset.labelled)}
        configuration.save(config, workdir, facts(), sizes | {"digest": dataset.digest})
        if not goes_on:
            learned.keep(workdir, dataset.images | begins_with)
    cluster.meet("configuration")
    configuration.load(workdir)  # raises where a process does not see the folder of the others
    cluster.say(f"{config.dataset}: {dataset.summary}")
    run = Run(config, pathlib.Path(workdir), mesh, dataset)

    names = steps.network_names(config)
    params = steps.init_params(names, "train", config, run.key)
    if not goes_on:
        params |= run.taught(names, params)
    state = run.train(names, params)
    if cluster.first():
        figures.training_curves(workdir)
    return state


class Run:
    """What the stages of one run share: the configuration, the mesh, the resident data and the key."""

    def __init__(self, config, workdir: pathlib.Path, mesh, dataset: data.TrainingSet):
        self.config, self.workdir, self.mesh, self.dataset = config, workdir, mesh, dataset
        self.key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=sharding.replicated(mesh))()
        self.resident = None
        if not data.streamed(config.data, dataset.rows):
            self.resident = sharding.everywhere(dataset.rows.take(dataset.unlabelled, config.data.threads), mesh)
        cluster.meet("data")

    def taught(self, names, params) -> dict:
        """Of `params`, random ones, those of networks that another run or masked image modelling has taught."""
        config, known = self.config, {}
        if config.files.init:
            known = initial.take(self.workdir, config, names)
            cluster.say(f"{', '.join(known)}: weights of {config.files.init}")
        targets = tuple(name for name in steps.mim_targets(config) if name in names and name not in known)
        epoch = -(-len(self.dataset.unlabelled) // config.mim.batch)
        total = configuration.steps_of(config.mim.steps, epoch=epoch, key="mim.steps")
        if total and targets:
            pretrained = self.pretrain(targets, total, epoch)
            known |= {name: params[name] | {"encoder": pretrained.params[name]["encoder"]} for name in targets}
        return known

    def pretrain(self, names, total: int, epoch: int) -> steps.TrainState:
        """Stage 1, masked image modelling on the pool, `total` steps."""
        config, cfg = self.config, self.config.mim
        schedule = steps.make_schedule(config.optim, total, lr=cfg.lr, schedule="cosine")
        tx = steps.make_optimizer(config.optim, names, schedule)
        networks = steps.make_networks(names, "pretrain", config)
        return self.stage(
            "pretrain", total=total, epoch=epoch, images=cfg.batch,
            params=steps.init_params(names, "pretrain", config, self.key), tx=tx, averaged=False,
            step_fn=functools.partial(steps.pretrain_step, networks=networks, tx=tx, config=config),
            batches=self.batches({"unlabelled": data.order(config.seed, "pretrain", self.dataset.unlabelled)}, cfg.batch),
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
            params=params, tx=tx,
            step_fn=functools.partial(steps.train_step, networks=networks, tx=tx, config=config, steps=total, epoch=epoch),
            batches=self.batches(orders, cfg.batch),
            after=validate, draw=figures.training_figure(self, networks, labelled, steps=total),
        )

    def plateau(self, network, epoch: int, total: int):
        """The plateau schedule's validation set, cut from the labelled budget, and the function that feeds it."""
        cfg = self.config.optim.plateau
        labelled, held_out = data.hold_out(self.dataset.labelled, cfg.holdout, seed=self.config.label_seed)
        if not len(labelled):
            raise UserError(
                f"config key optim.plateau.holdout={cfg.holdout}: of {len(held_out)} labelled images none is left to learn"
                " from; make it smaller, or use optim.schedule=cosine"
            )
        every = max(configuration.steps_of(cfg.every, epoch=epoch, total=total, key="optim.plateau.every"), 1)
        whole = sharding.replicated(self.mesh)
        predict = jax.jit(functools.partial(steps.eval_step, network=network), out_shardings=whole)
        transform = steps.make_plateau(self.config.optim)
        validation, batch = self.dataset.rows.take(held_out), trained.batch_of(self.config.size)

        def validate(step, state):
            if step % every:
                return state, {}
            found = np.concatenate([
                jax.device_get(predict(state.ema["student"], trained.padded(group, batch)))[: len(group)] > 0
                for group in trained.batched(validation["image"], batch)
            ])
            counts = [metrics.confusion(p, t > 127) for p, t in zip(found, validation["mask"], strict=True)]
            dice = metrics.scores(counts)["dice"].mean()
            _, plateau = transform.update({}, jax.device_get(state.plateau), value=1 - np.float32(dice))
            plateau = sharding.everywhere(jax.device_get(plateau), self.mesh)
            return state.replace(plateau=plateau), {"validation_dice": float(dice), "lr_scale": float(plateau.scale)}

        return labelled, validate

    def batches(self, orders: dict, batch: int):
        """A function of the first step: the (data, index) that `steps.rows` takes, step after step.

        A process reads its own share of each global batch and no more.
        """
        mine = sharding.share(self.mesh, batch)

        def resident(first):
            for step in itertools.count(first):
                index = {name: data.batch_at(order, step, batch)[mine] for name, order in orders.items()}
                yield self.resident, sharding.spread(index, self.mesh, batch)

        def streamed(first):
            threads = self.config.data.threads
            streams = {
                name: data.stream(self.dataset.rows, order, first=first, batch=batch, share=mine, threads=threads)
                for name, order in orders.items()
            }
            while True:
                fetched = {name: next(stream) for name, stream in streams.items()}
                yield sharding.spread(fetched, self.mesh, batch), None

        return streamed if self.resident is None else resident

    def start(self, params, tx, *, averaged=True):
        """(state at step 0, where each of its leaves lies) on the mesh."""
        init = functools.partial(steps.init_state, tx=tx, optim=self.config.optim, averaged=averaged)
        layout = sharding.layout(jax.eval_shape(init, params), self.mesh, fsdp=self.config.mesh.fsdp)
        return jax.jit(init, out_shardings=layout, compiler_options={"xla_backend_optimization_level": 0})(params), layout

    def compiled(self, step_fn, layout):
        """The step as the loop calls it; the state lies as `layout` says, before and after."""
        if self.config.mesh.fsdp:
            step_fn = sharding.gathering(step_fn, self.mesh)
        return jax.jit(step_fn, donate_argnums=0, out_shardings=(layout, sharding.replicated(self.mesh)))

    def stage(
        self, name, *, total, epoch, images, params, tx, step_fn, batches, averaged=True, after=None, draw=None
    ) -> steps.TrainState:
        """Run one stage to `total` steps, from its newest checkpoint if there is one. Preempted when told to leave."""
        cfg = self.config.train
        every = {
            what: max(configuration.steps_of(cfg[f"{what}_every"], epoch=epoch, total=total, key=f"train.{what}_every"), 1)
            for what in ("log", "save", "figures")
        }
        state, layout = self.start(params, tx, averaged=averaged)
        step_fn = self.compiled(step_fn, layout)
        with checkpoint.open_manager(self.workdir, name, keep=cfg.keep) as manager, Notice() as leave:
            state = checkpoint.restore(manager, state) or state
            first = int(state.step)
            if first:
                cluster.say(f"{name}: going on from step {first} of {total}")
            logger = Logger(self.workdir, name, step=first, steps=total, images_per_step=images)
            started = time.perf_counter()
            for step, (arrays, index) in zip(range(first, total), batches(first), strict=False):
                if step == first and jax.process_count() > 1:
                    # gloo waits 30 s for the others at a program's first collective, and one may compile for longer.
                    step_fn = step_fn.lower(state, arrays, index, self.key).compile()
                    cluster.meet(f"{name} is compiled")
                state, measured = step_fn(state, arrays, index, self.key)
                logger.add(measured)
                done, last = step + 1, step + 1 == total
                if after is not None:
                    state, validated = after(done, state)
                    if validated:
                        logger.write(done, "validation", validated)
                leaving = leave()
                keep = done % every["save"] == 0 or last or leaving
                if done % every["log"] == 0 or keep:
                    logger.flush(done)  # before any save: what is not finite is not kept
                if keep:
                    checkpoint.save(manager, done, state)
                if leaving:
                    manager.wait_until_finished()
                    raise Preempted(f"{name}: told to leave, saved at step {done} of {total}")
                if draw and done % every["figures"] == 0 and not last:
                    logger.picture(done, draw(done, state))
            manager.wait_until_finished()
            if leave.told:  # since the last step
                raise Preempted(f"{name}: told to leave, saved at step {total} of {total}")
            if draw and not figures.training_path(self.workdir, total).exists():  # now that all is saved
                logger.picture(total, draw(total, state))
            if first < total:
                cluster.say(f"{name}: {total - first} steps in {time.perf_counter() - started:.0f} s")
        return state


def facts() -> dict:
    """What a result must say about where it comes from: commit, versions, hardware."""
    root = pathlib.Path(__file__).parent.parent

    def git(*args):
        if not (root / ".git").exists():  # installed, maybe in a folder that is in somebody else's repository
            return ""
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
        "hardware": f"{jax.device_count()} x {device.platform} ({kind}), {sharding.cpu_count()} CPU cores",
    }
