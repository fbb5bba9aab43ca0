"""What the devices say to each other in a step, read from the compiled program, and what that costs on real links.

    python -m benchmarks.scaling [--preset=full] [--devices=1,8,64] [--batch=16] [--fsdp]

Compiles stage 2 for meshes of fake CPU devices and runs nothing; `--devices=` compiles nothing. Then a model of what it
means for real ones: docs/clusters.md says what it assumes.
"""

import argparse
import collections
import math
import re

import jax

BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Bytes a second that one accelerator sends while it receives as many, and seconds for a message to arrive: makers' figures.
LINKS = {
    "NVLink 4 (8 H100 of a host)": (450e9, 3e-6),
    "ICI of TPU v5e (200 GB/s a chip)": (200e9, 1e-6),
    "400 Gb/s Ethernet or InfiniBand, one port a GPU": (50e9, 10e-6),
    "100 Gb/s Ethernet, one port for 8 GPUs": (12.5e9 / 8, 30e-6),
}
SUSTAINED = 50e12  # flop/s of one accelerator in these small float32 networks: an assumption, not a measurement


def collectives(hlo: str) -> list[tuple[str, tuple[int, ...], int]]:
    """(kind, dimensions, bytes) of every array in every collective of a compiled program's text."""
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if match:
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                shape = tuple(int(d) for d in dims.split(",") if d)
                found.append((match[2], shape, BYTES[dtype] * math.prod(shape)))
    return found


def by_kind(found) -> dict[str, int]:
    """{kind: bytes}."""
    total = collections.Counter()
    for kind, _, size in found:
        total[kind] += size
    return dict(total)


def ring(size: float, devices: int, bandwidth: float, latency: float) -> float:
    """Seconds of an all-reduce of `size` bytes: each device sends 2 (n - 1) / n of them in 2 (n - 1) messages."""
    return 2 * (devices - 1) / devices * size / bandwidth + 2 * (devices - 1) * latency


def efficiency(flops: float, size: float, devices: int, bandwidth: float, latency: float) -> float:
    """Share of a step that is work when nothing overlaps; flops of ONE device, bytes that are reduced."""
    work = flops / SUSTAINED
    return work / (work + ring(size, devices, bandwidth, latency))


def lowered_step(config, devices: int):
    """The stage-2 step of a checked configuration on a mesh, lowered, and the bytes of theta."""
    import functools

    import jax.numpy as jnp

    from mira_u_jax import sharding, steps

    mesh = sharding.make_mesh(devices)
    names = steps.network_names(config)
    tx = steps.make_optimizer(config.optim, names, steps.make_schedule(config.optim, 100, lr=1e-3, schedule="cosine"))
    state = jax.eval_shape(
        functools.partial(steps.init_state, tx=tx, optim=config.optim),
        jax.eval_shape(functools.partial(steps.fresh_params, names, "train", config), jax.random.key(0)),
    )
    theta = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    layout = sharding.layout(state, mesh, fsdp=config.mesh.fsdp)
    whole, spread = sharding.replicated(mesh), sharding.batched(mesh)
    shaped = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)  # noqa: E731
    images = {
        "image": jax.ShapeDtypeStruct((900, config.size, config.size, 3), jnp.uint8, sharding=whole),
        "mask": jax.ShapeDtypeStruct((900, config.size, config.size), jnp.uint8, sharding=whole),
    }
    places = jax.ShapeDtypeStruct((config.train.batch,), jnp.int32, sharding=spread)
    index = {"labelled": places, "unlabelled": places}
    key = shaped(jax.eval_shape(lambda: jax.random.key(0)), whole)
    step = functools.partial(
        steps.train_step, networks=steps.make_networks(names, "train", config), tx=tx, config=config, steps=100, epoch=50
    )
    if config.mesh.fsdp:
        step = sharding.gathering(step, mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(layout, whole))
    return step.lower(jax.tree.map(shaped, state, layout), images, index, key), theta


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="full")
    parser.add_argument("--devices", default="1,8,64")
    parser.add_argument("--batch", type=int, default=16, help="labelled images a device, and as many unlabelled")
    parser.add_argument("--fsdp", action="store_true")
    args = parser.parse_args()
    meshes = [int(n) for n in args.devices.split(",") if n]
    jax.config.update("jax_num_cpu_devices", max(meshes, default=1))
    jax.config.update("jax_disable_most_optimizations", True)

    from configs import common
    from mira_u_jax import config as configuration

    def lower(devices):
        config = common.get_config(f"preset={args.preset},batch={args.batch * devices}")
        configuration.update(config, {"mesh.fsdp": args.fsdp})
        return lowered_step(configuration.check(config), devices)

    step, theta = lower(1)
    flops = step.cost_analysis()["flops"]
    images = f"{args.batch} + {args.batch} images a device"
    print(f"preset {args.preset}, {images}: {flops / 1e9:.1f} Gflop, theta {theta / 1e6:.2f} MB", flush=True)
    for devices in meshes:
        sizes = by_kind(collectives(lower(devices)[0].compile().as_text()))
        said = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in sizes.items()) or "none"
        print(f"{devices:>3} devices: {said}", flush=True)
    if args.fsdp:
        print("\nno prediction with --fsdp: its gathering of parameters has no model here")
        return
    print(f"\npredicted efficiency, same batch a device, {SUSTAINED / 1e12:.0f} Tflop/s sustained, nothing overlapped")
    for name, link in LINKS.items():
        shares = "  ".join(f"{n}: {efficiency(flops, theta, n, *link):.3f}" for n in (2, 8, 16, 64, 256))
        print(f"  {name:<50} {shares}")


if __name__ == "__main__":
    main()
