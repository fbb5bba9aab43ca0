"""Our side of the benchmark: the compiled step, its parts and the machine's peak. Runs in a process of its own."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.remote import median_seconds, peak_memory
from benchmarks.setting import COMPARED, config_of, drawn_images
from mira_u_jax import augment, command, data, pseudo, sharding, steps
from mira_u_jax.rng import named

KEY, STEPS, EPOCH, BEGIN = 0, 1_000, 25, 200  # a run of STEPS steps, timed from step BEGIN on, where beta is above 0


class Ours:
    """The step of one setting (setting.py); nothing is compiled before it is asked for."""

    def __init__(self, setting: dict):
        command.set_up()  # the compilation cache, as every command has it
        self.setting, self.config = setting, config_of(setting)
        sharding.use_cores(self.config)  # and devices
        self.mesh = sharding.make_mesh()
        everywhere = sharding.replicated(self.mesh)
        self.names = steps.network_names(self.config)
        self.networks = steps.make_networks(self.names, "train", self.config)
        schedule = steps.make_schedule(self.config.optim, STEPS, lr=self.config.optim.lr, schedule="cosine")
        self.tx = steps.make_optimizer(self.config.optim, self.names, schedule)
        host = drawn_images(self.config.size)
        self.resident, self.key = jax.device_put((host, jax.random.key(KEY)), everywhere)
        pool = np.arange(len(host["image"]), dtype=np.int32)
        self.orders = {name: data.order(0, name, pool) for name in ("labelled", "unlabelled")}
        params = steps.init_params(self.names, "train", self.config, self.key)
        state = steps.init_state(params, self.tx, self.config.optim)
        self.state = jax.block_until_ready(jax.device_put(state.replace(step=state.step + BEGIN), everywhere))
        self.done = 0

    def index(self):
        """The next batch, drawn on the host and put on the device, as the loop does it."""
        batch = self.config.train.batch
        self.done += 1
        index = {name: data.batch_at(order, self.done, batch) for name, order in self.orders.items()}
        return sharding.spread(index, self.mesh, batch)

    # --- the whole step -----------------------------------------------------------------------------------------------

    def step(self, state, data, index, key):
        return steps.train_step(
            state, data, index, key, networks=self.networks, tx=self.tx, config=self.config, steps=STEPS, epoch=EPOCH
        )

    def lowered(self):
        whole = sharding.replicated(self.mesh)
        return jax.jit(self.step, donate_argnums=0, out_shardings=whole).lower(
            self.state, self.resident, self.index(), self.key
        )

    def count(self) -> float:
        """XLA's count of the operations of a step before it is optimised, nothing compiled; KeyError where it gives none."""
        return cost_of(self.lowered())["flops"]

    def compile(self) -> dict:
        """Compile the step and run it once: seconds and what XLA says of it, bytes and operations a step."""
        start = time.perf_counter()
        lowered = self.lowered()
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        compiled = time.perf_counter()
        first = self.run(1)
        cost, memory = cost_of(self.compiled), self.compiled.memory_analysis()
        return {
            "trace_s": traced - start, "compile_s": compiled - traced, "first_step_s": first,
            "flops": self.all_devices(cost, "flops"), "flops_before_optimisation": cost_of(lowered).get("flops"),
            "bytes": self.all_devices(cost, "bytes accessed"),
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        }

    def all_devices(self, cost: dict, name: str) -> float | None:
        """XLA counts what one device does."""
        return cost[name] * self.mesh.size if name in cost else None

    def run(self, count: int) -> float:
        """Seconds for `count` steps, input included."""
        start = time.perf_counter()
        for _ in range(count):
            self.state, measured = self.compiled(self.state, self.resident, self.index(), self.key)
        jax.block_until_ready((self.state, measured))
        seconds = time.perf_counter() - start
        if not np.isfinite(measured["loss"]):
            raise FloatingPointError("our loss is not finite")
        return seconds

    def facts(self) -> dict:
        """Commit, versions, hardware. Imports the loop, so not before the start of a process has been timed."""
        from mira_u_jax import train

        return train.facts()

    def parameters(self) -> dict:
        """theta as NumPy trees."""
        return jax.device_get(self.state.params)

    def peak_memory(self) -> int:
        return peak_memory()

    def replicas(self, count: int, seconds: float) -> float:
        """Seconds of a step of `count` train states in one program, mapped over states and keys, all on the same batch."""
        made = jax.jit(jax.vmap(self.step, in_axes=(0, None, None, 0)), donate_argnums=0)
        states = jax.tree.map(lambda x: jnp.stack([x] * count), self.state)
        keys, index = jax.random.split(self.key, count), self.index()

        def call():
            nonlocal states
            states, measured = jax.block_until_ready(made(states, self.resident, index, keys))
            if not np.isfinite(measured["loss"]).all():
                raise FloatingPointError("the loss of a replica is not finite")

        return median_seconds(call, seconds=seconds)

    def trace(self, folder: str, count: int = 3):
        """A profile of `count` steps, for TensorBoard or xprof."""
        with jax.profiler.trace(folder):
            self.run(count)

    # --- the same losses ----------------------------------------------------------------------------------------------

    def example(self, update: bool = False) -> dict:
        """What the peer needs to repeat a step without dropout, and what we found: theta, phi, views, step, losses.

        phi is theta with noise, so that a mix-up of the two shows; NumPy trees throughout. update: also the whole step, with
        a constant learning rate from the first step on: norms of the gradients, theta and phi after it.
        """
        config = config_of(self.setting | {"set": [*self.setting.get("set", ()), *COMPARED]})
        parts = dict(
            networks=steps.make_networks(self.names, "train", config), config=config, steps=STEPS, epoch=EPOCH,
            tx=steps.make_optimizer(config.optim, self.names, lambda _: config.optim.lr),
        )
        random = np.random.default_rng(0)
        phi = jax.tree.map(lambda p: p + np.float32(0.3 * random.normal(size=p.shape) * abs(p)), self.state.params)
        index = self.index()

        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # used once
        def found(state, data, index, key):  # XLA leaves out what is not asked for
            new, measured = steps.train_step(state, data, index, key, **parts)
            losses = {k: v for k, v in measured.items() if k.startswith("loss")}
            seen = views(jax.random.fold_in(named(key, "train"), state.step), data, index, config)
            return losses, seen, (new.params, new.ema, measured) if update else None

        losses, seen, after = jax.device_get(found(self.state.replace(ema=phi), self.resident, index, self.key))
        example = {
            "params": self.parameters(), "ema": jax.device_get(phi), "step": int(self.state.step), "steps": STEPS,
            "views": seen, "losses": {k: float(v) for k, v in losses.items()},
        }
        if update:
            norms = {k: float(v) for k, v in after[2].items() if k.startswith("grad")}
            example["after"] = {"params": after[0], "ema": after[1], "norms": norms}
        return example

    # --- parts --------------------------------------------------------------------------------------------------------

    def part(self, name: str, seconds: float) -> float:
        """Seconds of one part of the step, each compiled by itself; see PARTS."""
        return median_seconds(PARTS[name](self), seconds=seconds)

    def inputs(self, seed: int = 1):
        """A step's views and a pseudo-label, drawn: the labelled and the strong batch together, and what belongs to them."""
        b, size, key = self.config.train.batch, self.config.size, jax.random.key(seed)
        noise = jax.random.uniform(key, (2 * b, size, size, 3))
        y = jnp.round(noise[:b, ..., 0])
        maps = noise[b:, ..., 1]
        label = pseudo.PseudoLabel(maps, maps, jnp.ones_like(maps), jnp.ones_like(maps), maps)
        view = steps.View(noise[b:], jnp.ones_like(maps), maps, dict.fromkeys(pseudo.LEARNERS, label))
        return jax.device_put((noise, y, view), sharding.batched(self.mesh))

    def augmentation(self):
        made = jax.jit(functools.partial(views, config=self.config))
        index = self.index()
        return lambda: jax.block_until_ready(made(self.key, self.resident, index))

    def moved(self):
        """What the losses read of a pseudo-label, taken to where the strong views are."""
        view, b = self.inputs()[2], self.config.train.batch
        label = view.labels["student"]
        draw = functools.partial(augment.random_affine, cfg=self.config.augment.geometry)
        affine = jax.device_put(jax.vmap(draw)(jax.random.split(self.key, b)), sharding.batched(self.mesh))
        made = jax.jit(augment.moved)
        return lambda: jax.block_until_ready(made((view.p_w, label.target, label.w, label.keep), affine))

    def teacher(self, passes: int | None = None, name: str | None = None):
        """The M passes and the labels from them; or `passes` of one network."""
        image = self.inputs()[2].image
        if name:
            # The image as an argument: what a program only closes over it holds whole on every device.
            made = jax.jit(lambda phi, image, key: pseudo.teacher_passes(self.networks[name], phi[name], image, key, passes))
            return lambda: jax.block_until_ready(made(self.state.ema, image, self.key))
        made = jax.jit(lambda state, image, key: pseudo.pseudo_labels(
            state, image, key, networks=self.networks, config=self.config, share=0.5
        ))
        return lambda: jax.block_until_ready(made(self.state, image, self.key))

    def forward(self, name: str):
        x = self.inputs()[0]
        made = jax.jit(lambda params, x, key: self.networks[name](params, x, key=key))
        return lambda: jax.block_until_ready(made(self.state.params[name], x, self.key))

    def weak(self):
        image, network = self.inputs()[2].image, self.networks["student"]
        made = jax.jit(lambda params, x: jax.nn.sigmoid(network(params, x)))
        return lambda: jax.block_until_ready(made(self.state.params["student"], image))

    def backward(self, name: str):
        cfg, network, (x, y, view) = self.config.loss, self.networks[name], self.inputs()

        @jax.jit
        def made(params, x, y, view, key):
            def loss(params):
                z = network.outputs(params, x, key=key)
                sup = steps.over_outputs(steps.equations.supervised_loss, z[:, : len(y)], y)
                return sup + steps.unsupervised(z[:, len(y) :], view, name, cfg)

            return jax.grad(loss)(params)

        return lambda: jax.block_until_ready(made(self.state.params[name], x, y, view, self.key))

    def optimiser(self):
        grads = jax.tree.map(lambda p: p + 0.01, self.state.params)
        held = jax.tree.map(jnp.copy, self.state)

        @functools.partial(jax.jit, donate_argnums=0)
        def made(state, grads):
            return steps.average(steps.update(state, grads, self.tx)[0], self.config.ema.alpha)

        def call():
            nonlocal held
            held = jax.block_until_ready(made(held, grads))

        return call

    # --- the machine --------------------------------------------------------------------------------------------------

    def device(self) -> dict:
        """What the steps run on; peak_bytes is None where a device does not say, as a CPU."""
        first = jax.local_devices()[0]
        return {
            "platform": first.platform, "kind": first.device_kind, "devices": self.mesh.size,
            "peak_bytes": (first.memory_stats() or {}).get("peak_bytes_in_use"),
        }

    def peak(self, seconds: float, side: int = 2048, megabytes: int = 256, dtype: str = "float32") -> dict:
        """What one device can do: operations/s of a large product, bytes/s read and written by a large copy."""
        a = jax.random.normal(jax.random.key(0), (side, side), dtype)
        product = jax.jit(lambda a: a @ a)
        copy = jax.jit(lambda x, out: x + 1, donate_argnums=1, keep_unused=True)  # into memory that is already there
        x, out = jnp.zeros(megabytes * 2**18), jnp.zeros(megabytes * 2**18)

        def copied():
            nonlocal out
            out = copy(x, out).block_until_ready()

        return {
            "flops_per_s": 2 * side**3 / median_seconds(lambda: product(a).block_until_ready(), seconds=seconds),
            "bytes_per_s": 2 * x.nbytes / median_seconds(copied, seconds=seconds),
        }


PARTS = {
    "input": lambda ours: ours.index,
    "augmentation": Ours.augmentation,
    "labels moved": Ours.moved,
    "teacher passes": Ours.teacher,
    "weak prediction": Ours.weak,
    "student forward": functools.partial(Ours.forward, name="student"),
    "student forward + backward": functools.partial(Ours.backward, name="student"),
    "ViT forward + backward": functools.partial(Ours.backward, name="vit"),
    "optimiser + EMA": Ours.optimiser,
    "one ViT pass": functools.partial(Ours.teacher, passes=1, name="vit"),
    "one student pass": functools.partial(Ours.teacher, passes=1, name="student"),
}


def views(key, data, index, config) -> dict:
    """The views of train_step with its own keys, before CutMix, and its boxes: what Peer.losses takes, channels last."""
    image, mask = ({name: data[what][rows] / np.float32(255) for name, rows in index.items()} for what in ("image", "mask"))
    x, y = augment.labelled_view(named(key, "labelled"), image["labelled"], mask["labelled"], config.augment)
    x_w, [(x_s, notcut)], affine, _ = augment.weak_strong_views(
        named(key, "unlabelled"), image["unlabelled"], mask["unlabelled"], config.augment
    )
    own = jnp.broadcast_to(jnp.arange(len(notcut))[:, None, None], notcut.shape)
    box = augment.cutmix(named(key, "cutmix/0"), config.augment.cutmix, own) != own
    affine = affine[:, ::-1][:, :, jnp.array([1, 0, 2])]  # the peer has x before y
    return dict(x=x, y=y, x_w=x_w, x_s=x_s, notcut=notcut, affine=affine, box=box)


def cost_of(stage) -> dict:
    cost = stage.cost_analysis() or {}
    return cost[0] if isinstance(cost, list) else cost
