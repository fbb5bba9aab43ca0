"""A few steps of stage 2 on as many CPU devices as asked: what sharding_test.py compares.

    python tests/devices.py --devices=1,2,8,8f --steps=1 --out=FILE.npz [--x64]

FILE: for each of the meshes (f: with FSDP) the losses of the steps, every gradient of step 1, the parameters at the end,
and the text of the compiled step, under names like "8f losses".
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp

parser = argparse.ArgumentParser()
parser.add_argument("--devices", required=True)
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--out", required=True)
parser.add_argument("--x64", action="store_true", help="everything that is float32 in float64")
args = parser.parse_args()

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
jax.config.update("jax_num_cpu_devices", max(int(devices.rstrip("f")) for devices in args.devices.split(",")))
jax.config.update("jax_disable_most_optimizations", not args.x64)  # without them convolutions of float64 take minutes
if args.x64:
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64  # before anything takes it as a default

import functools  # noqa: E402

import numpy as np  # noqa: E402
import optax  # noqa: E402

from configs import common  # noqa: E402
from mira_u_jax import config as configuration  # noqa: E402
from mira_u_jax import data, sharding, steps, train  # noqa: E402

SMALL = {  # a Swin pair, a cross and a gated skip, both networks, all losses; a ViT that makes up most of theta
    "vit.channels": 256, "vit.hidden": 512,
    "student.widths": (8, 16, 16), "student.stages": ("conv", "conv", "swin"), "student.skips": ("gate", "cross"),
    "mim.steps": 0, "train.batch": 16, "train.steps": 50, "teacher.passes": 2, "optim.warmup": 0.0, "loss.ramp": 0.1,
}


class Probe(train.Run):
    """Run.train up to the loop, and there: compile, step, keep what is asked for."""

    def stage(self, name, *, params, tx, step_fn, batches, **_):
        def record():
            return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p=None: (g, g))

        tx = optax.chain(record(), tx)
        state, layout = self.start(params, tx)
        step_fn = functools.partial(step_fn.func, **step_fn.keywords | {"tx": tx})
        step = self.compiled(step_fn, layout)
        batches, found = batches(0), {}
        arrays, index = next(batches)
        step = step.lower(state, arrays, index, self.key).compile()
        losses = []
        for n in range(args.steps):
            state, metrics = step(state, arrays, index, self.key)
            losses.append(float(metrics["loss"]))
            if n == 0:
                found |= named("gradient", state.opt[0])
            arrays, index = next(batches)
        return found | named("params", state.params) | {"losses": np.array(losses), "hlo": np.array(step.as_text())}


def named(prefix, tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {prefix + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def main():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    source = []
    for centre in rng.uniform(10, 22, (40, 2)):
        inside = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 50)[..., None]
        skin = np.where(inside, [110, 70, 60], [220, 180, 160]) + rng.normal(0, 10, (32, 32, 3))
        source.append({"image": skin.clip(0, 255).astype(np.uint8), "mask": inside.astype(np.uint8) * 255})
    rows = data.Rows(source, np.arange(40, dtype=np.int32), 32)
    dataset = data.TrainingSet(rows, np.arange(0, 40, 4, dtype=np.int32), np.arange(40, dtype=np.int32), "drawn")
    found = {}
    for devices in args.devices.split(","):
        config = common.get_config("preset=smoke")
        configuration.update(config, SMALL | {"mesh.fsdp": devices.endswith("f")})
        config = configuration.check(config)
        run = Probe(config, pathlib.Path("unused"), sharding.make_mesh(int(devices.rstrip("f"))), dataset)
        names = steps.network_names(config)
        values = run.train(names, steps.init_params(names, "train", config, run.key))
        found |= {f"{devices} {name}": value for name, value in values.items()}
    np.savez(args.out, **found)


if __name__ == "__main__":
    main()
