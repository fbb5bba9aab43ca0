"""One mesh: where arrays lie, and that a step on 1, 2 and 8 devices is the same step. The steps run in devices.py."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from benchmarks import scaling
from mira_u_jax import sharding

HERE = pathlib.Path(__file__).parent


def layout(shapes, devices, fsdp=True):
    """{name: PartitionSpec} by the rule, on a mesh that need not exist."""

    class Mesh:
        size = devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "NamedSharding", lambda mesh, spec: spec)
        return sharding.layout({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}, Mesh, fsdp=fsdp)


def test_the_rule_spreads_the_longest_axis_that_the_devices_divide():
    shapes = {
        "dense": (64, 256), "conv": (3, 3, 128, 64), "square": (128, 128), "bias": (256,), "odd": (225, 33), "scalar": (),
        "not by the longest": (225, 64),
    }
    assert layout(shapes, 8) == {
        "dense": PartitionSpec(None, "data"), "conv": PartitionSpec(None, None, "data"),
        "square": PartitionSpec(None, "data"), "bias": PartitionSpec(), "odd": PartitionSpec(), "scalar": PartitionSpec(),
        "not by the longest": PartitionSpec(None, "data"),
    }
    assert set(layout(shapes, 8, fsdp=False).values()) == {PartitionSpec()}


@pytest.mark.parametrize(("batch", "mim", "asked", "environment", "count"), [
    (8, 16, "auto", {}, 4), (4, 16, "auto", {}, 2), (8, 3, "auto", {}, 1), (8, 16, 3, {}, 3),
    (8, -3, "auto", {}, 4),  # no masked image modelling
    (8, 16, "auto", {"JAX_NUM_CPU_DEVICES": "5"}, 5),
    (8, 16, "auto", {"XLA_FLAGS": "--xla_force_host_platform_device_count=6"}, 6),
])
def test_a_core_is_a_device_where_it_divides_the_batches(batch, mim, asked, environment, count):
    """On a machine of seven cores."""
    code = f"""
import jax
from configs import common
from mira_u_jax import config, sharding
sharding.cpu_count = lambda: 7
c = common.get_config("preset=smoke")
config.update(c, {{"mesh.cpu_devices": {asked!r}, "train.batch": {batch}}})
config.update(c, {{"mim.batch": abs({mim}), "mim.steps": max({mim}, 0)}})
sharding.use_cores(c)
print(jax.device_count())
"""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")} | environment
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=HERE.parent)
    assert found.stdout.split() == [str(count)], found.stderr


def test_one_process_has_the_whole_batch():
    mesh = sharding.make_mesh()
    assert sharding.share(mesh, 12) == slice(0, 12)
    index = {"labelled": np.arange(12, dtype=np.int32)}
    spread = sharding.spread(index, mesh, 12)["labelled"]
    np.testing.assert_array_equal(spread, index["labelled"])
    assert spread.sharding == sharding.batched(mesh)


# --- collectives, read from a program's text ------------------------------------------------------------------------------

HLO = """
  %all-reduce.3 = f32[16,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %ar = (f32[4]{0}, f32[3,3,8,8]{3,2,1,0}) all-reduce(%a, %b), channel_id=2, to_apply=%add
  %ag = bf16[64,32]{1,0} all-gather-start(%y), dimensions={0}
  %d = f32[64]{0} add(%all-reduce.3, %ar)
"""


def test_collectives_are_counted_in_bytes():
    found = scaling.collectives(HLO)
    assert scaling.by_kind(found) == {"all-reduce": 4 * (128 + 4 + 576), "all-gather": 2 * 64 * 32}
    assert ("all-reduce", (3, 3, 8, 8), 2304) in found


def test_the_cost_model_at_its_limits():
    assert scaling.ring(1e6, 1, 1e9, 1e-6) == 0
    assert scaling.ring(1e6, 2, 1e9, 0) == pytest.approx(1e-3)  # each sends half, twice
    assert scaling.ring(1e6, 10**6, 1e9, 0) == pytest.approx(2e-3, rel=1e-5)
    assert scaling.efficiency(scaling.SUSTAINED, 0.0, 8, 1e9, 0) == 1


# --- a step on several devices --------------------------------------------------------------------------------------------


def steps_on(tmp_path, devices, *more):
    """{name: array} of devices.py, by mesh."""
    command = [sys.executable, str(HERE / "devices.py"), f"--devices={','.join(devices)}", f"--out={tmp_path / 'out.npz'}"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    split = {name: {} for name in devices}
    for name in found.files:
        mesh, _, rest = name.partition(" ")
        split[mesh][rest] = found[name]
    return split


@pytest.mark.slow
def test_loss_and_gradients_of_step_1_do_not_depend_on_the_devices_and_only_gradients_travel(tmp_path):
    found = steps_on(tmp_path, ("1", "2", "8", "8f"))
    one = found.pop("1")
    gradients = [name for name in one if name.startswith("gradient")]
    assert len(gradients) > 50 and not scaling.collectives(str(one["hlo"]))
    for mesh, other in found.items():
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5, err_msg=mesh)
        for name in gradients:
            scale = max(np.abs(one[name]).max(), 1e-3)
            np.testing.assert_allclose(other[name] / scale, one[name] / scale, atol=1e-5, err_msg=f"{mesh} {name}")

    theta = sum(one[name].nbytes for name in gradients)
    kinds = scaling.by_kind(scaling.collectives(str(found["8"]["hlo"])))
    assert set(kinds) == {"all-reduce"}, kinds
    assert theta <= kinds["all-reduce"] <= 1.1 * theta, (kinds, theta)

    shapes = {one[name].shape for name in gradients}
    gathered = [shape for kind, shape, _ in scaling.collectives(str(found["8f"]["hlo"])) if kind == "all-gather"]
    assert gathered and set(gathered) <= shapes  # parameters, never activations


@pytest.mark.slow
def test_fifty_steps_in_float64_do_not_depend_on_the_devices(tmp_path):
    found = steps_on(tmp_path, ("1", "8"), "--steps=50", "--x64")
    assert found["1"]["losses"].dtype == np.float64 and found["1"]["losses"].shape == (50,)
    np.testing.assert_allclose(found["8"]["losses"], found["1"]["losses"], rtol=1e-8)
    assert found["1"]["losses"][-5:].mean() < found["1"]["losses"][:5].mean()  # it does learn
    for name in [name for name in found["1"] if name.startswith("params")]:
        assert found["1"][name].dtype == np.float64
        np.testing.assert_allclose(found["8"][name], found["1"][name], rtol=1e-6, atol=1e-8, err_msg=name)
