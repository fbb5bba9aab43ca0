"""The PyTorch peer of benchmarks/ takes our step, and the benchmark that compares the two runs."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import bench, grid, ours, remote, torch_networks  # noqa: E402
from benchmarks import torch_augment as augment  # noqa: E402
from benchmarks.peer import from_ours  # noqa: E402
from benchmarks.setting import COMPARED, config_of  # noqa: E402
from benchmarks.torch_step import LEARNERS, Peer  # noqa: E402
from mira_u_jax import augment as our_augment  # noqa: E402
from mira_u_jax import equations, steps  # noqa: E402

SETTING = {"preset": "smoke", "size": 32, "batch": 4, "passes": 4}
LOSSES = ("loss", "loss_sup", "loss_unsup", "loss_ent", "loss_vit_sup", "loss_vit_unsup")
PROMISED = (
    "setting", "compile_cold", "made_with", "compile_warm", "same_losses", "step_ours", "step_pytorch", "step_pytorch_loop",
    "vs_pytorch", "vs_pytorch_loop", "peak_memory", "machine", "operations", "share_of_peak", "bytes", "peer_honesty",
)


@pytest.fixture(scope="module")
def our_side():
    """Our side of the benchmark, without the compilation cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.command, "set_up", lambda: None)
        return ours.Ours(SETTING)


@pytest.fixture(scope="module")
def example(our_side):
    return our_side.example()


def peer_of(example, **options):
    peer = Peer(
        config_of(SETTING | {"set": COMPARED}), example["params"], ema=example["ema"], steps=example["steps"], **options
    )
    peer.at = example["step"]
    return peer


@pytest.mark.parametrize("passes", ["batched", "loop"])
def test_losses_equal_ours(example, passes):
    """On our views, dropout off, phi unlike theta; CutOut, CutMix and the confidences are all alive."""
    assert 0.05 < example["views"]["box"].mean() < 0.5 and example["views"]["notcut"].mean() < 1
    found = peer_of(example, passes=passes).losses(**from_ours(example["views"]))
    assert set(found) == set(example["losses"]) == set(LOSSES)
    for name in LOSSES:
        assert found[name].item() == pytest.approx(example["losses"][name], rel=1e-3), name


@pytest.mark.slow
def test_whole_update_equals_ours(our_side):
    """Norms of the gradients, theta after clip and AdamW, phi after Eq. (6)."""
    example = our_side.example(update=True)
    peer = peer_of(example)
    rate, wanted = peer.config.optim.lr, example["after"]
    peer.learning_rate = lambda step: rate
    norms = peer.update(peer.losses(**from_ours(example["views"]))["loss"])
    for name, value in wanted["norms"].items():
        assert norms[name].item() == pytest.approx(value, rel=1e-3), name
    for trees, networks, bound in ((wanted["params"], peer.theta, 0.05), (wanted["ema"], peer.phi, 5e-4)):
        for name in LEARNERS:
            pairs = zip(jax.tree.leaves(torch_networks.unload(networks[name])), jax.tree.leaves(trees[name]), strict=True)
            gap = np.concatenate([abs(a - b).ravel() for a, b in pairs]) / rate
            # Adam's first step is the sign of the gradient: where that is but rounding, either may come out
            assert (gap > bound).mean() < 0.02, (name, np.quantile(gap, [0.5, 0.9, 0.99]))


@pytest.fixture
def small(networks):
    """A peer with fresh weights, a few steps into its run, and a data set for it."""
    peer = Peer(config_of(SETTING), networks[1], steps=100)
    peer.at = 10
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8))
    mask = torch.from_numpy(rng.integers(0, 2, (12, 32, 32), dtype=np.uint8) * 255)
    index = {"labelled": torch.arange(4), "unlabelled": torch.arange(4, 8)}
    return peer, {"image": image, "mask": mask}, index


def values(nets):
    return [p.detach().clone() for net in nets.values() for p in net.parameters()]


def test_a_step_moves_theta_and_phi_follows(small):
    peer, data, index = small
    old_phi, old_theta = values(peer.phi), values(peer.theta)
    found = peer.step(data, index)
    assert set(LOSSES) < set(found) and all(np.isfinite(v.item()) for v in found.values())
    theta, phi = values(peer.theta), values(peer.phi)
    assert np.mean([bool((a != b).any()) for a, b in zip(theta, old_theta, strict=True)]) > 0.95
    alpha = min(1 - 1 / 11, peer.config.ema.alpha)
    for new, old, online in zip(phi, old_phi, theta, strict=True):
        torch.testing.assert_close(new, alpha * old + (1 - alpha) * online)
    assert not any(p.requires_grad for net in peer.phi.values() for p in net.parameters())


def test_passes_differ_by_dropout_and_nothing_else(small):
    peer, data, _ = small
    image = data["image"][:2].float() / 255
    for name in LEARNERS:
        with torch.no_grad():
            p = peer.teacher_passes(name, image, 3)
            assert p.shape == (3, 2, 32, 32) and p.std(0).mean() > 1e-4
            peer.phi[name].eval()
            p = peer.teacher_passes(name, image, 3)
            peer.passes = "loop"
            torch.testing.assert_close(peer.teacher_passes(name, image, 3), p, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(p[2], torch.sigmoid(peer.phi[name](image)), atol=1e-5, rtol=1e-4)
            peer.passes = "batched"


def test_schedules_equal_ours(small):
    peer, config = small[0], small[0].config
    schedule = steps.make_schedule(config.optim, 100, lr=config.optim.lr, schedule="cosine")
    for step in (0, 1, 4, 5, 6, 39, 40, 41, 80, 99):
        assert peer.learning_rate(step) == pytest.approx(float(schedule(step)), rel=1e-5, abs=1e-9)
        wanted = config.loss.beta * equations.ramp_up(step - config.loss.wait * 100, config.loss.ramp * 100)
        assert peer.beta(step) == pytest.approx(float(wanted), rel=1e-5)


def test_only_kernels_decay(small):
    decay, rest = small[0].groups()
    assert decay["weight_decay"] == 0.05 and rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decay["params"]) and len(decay["params"]) + len(rest["params"]) == len(
        [p for net in small[0].theta.values() for p in net.parameters()]
    )


@pytest.mark.parametrize("key", ["pseudo.label='hard'", "teacher.source='ema'", "ema.every=2"])
def test_what_the_peer_does_not_have_it_refuses(key):
    with pytest.raises(ValueError, match=key.partition("=")[0]):
        Peer(config_of(SETTING | {"set": [key]}), {}, steps=10)


# --- views ------------------------------------------------------------------------------------------------------------


def test_colour_operations_equal_ours():
    image = np.random.default_rng(0).uniform(size=(2, 8, 6, 3)).astype(np.float32)
    theirs = torch.tensor(image).permute(0, 3, 1, 2)
    for one, other in zip(our_augment.COLOUR_OPS, augment.COLOUR_OPS, strict=True):
        for m in (-0.9, 0.4):
            found = other(theirs, torch.full((2, 1, 1, 1), m)).permute(0, 2, 3, 1)
            wanted = np.stack([one(i, np.float32(m)) for i in image])
            np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=f"{one.__name__} {m}")


def test_warp_equals_ours():
    cfg = config_of(SETTING).augment.geometry
    affine = augment.random_affine(torch.Generator().manual_seed(0), 4, cfg)
    image = np.random.default_rng(0).uniform(size=(4, 12, 12, 3)).astype(np.float32)
    found = augment.warp(torch.tensor(image).permute(0, 3, 1, 2), affine).permute(0, 2, 3, 1)
    flipped = affine.numpy()[:, ::-1][:, :, [1, 0, 2]]  # ours has y before x
    wanted = np.stack([our_augment.warp(i, a) for i, a in zip(image, flipped, strict=True)])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_boxes_cover_what_they_should_and_partners_share_theirs():
    draw = torch.Generator().manual_seed(0)
    boxes = augment.random_boxes(draw, 200, 64, 48, 0.1, 0.5, "cpu").float()
    share = boxes.mean((1, 2))
    assert share.min() > 0.07 and share.max() < 0.53 and share.std() > 0.05
    box = augment.cutmix_boxes(draw, 8, 16, 16, 1.0, "cpu")
    x = torch.arange(8.0)[:, None, None].expand(8, 16, 16)
    mixed = augment.cutmix(box, x)
    assert (box[::2] == box[1::2]).all() and box.any() and not box.all()
    assert (mixed[0] == torch.where(box[0], 1.0, 0.0)).all() and (mixed[7] == torch.where(box[7], 6.0, 7.0)).all()
    assert not augment.cutmix_boxes(draw, 8, 16, 16, 0.0, "cpu").any()


# --- the harness --------------------------------------------------------------------------------------------------------


def test_remote_passes_on_results_and_errors():
    with remote.Remote("collections:Counter", "abca") as counter:
        assert counter("most_common", 1) == [("a", 2)]
        with pytest.raises(remote.RemoteError, match="TypeError"):
            counter("most_common", "x", 1)
        assert counter("total") == 4


def test_paired_ratio():
    assert bench.paired_ratio([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == (2.0, 2.0, 2.0)
    ratio, low, high = bench.paired_ratio([1.0, 2.0, 3.0, 9.0, 4.0], [1.0] * 5)
    assert ratio == 3 and 1 <= low < 3 < high <= 9


def test_a_process_that_ended_says_so_at_every_call():
    """The first call after its end finds the pipe closed, as do all others: none may raise anything else."""
    with remote.Remote("collections:Counter", "abca") as counter:
        counter.process.kill()
        counter.process.join()
        for _ in range(3):
            with pytest.raises(remote.RemoteError, match="ended with status -9"):
                counter("total")


def test_fits(tmp_path):
    """Times made from a known law give it back."""
    table = bench.Table(str(tmp_path / "rows.json"))
    found = {
        (size, m, b): {"seconds": (0.1 + 0.02 * m) * b * (size / 64) ** 2}
        for size in (64, 128) for m in (2, 8) for b in (4, 8)
    }
    for size in (64, 128):
        found[size, 8, 4] |= dict.fromkeys(grid.ALONE, 0.1) | {"student": size**2.0, "teacher": size**3.0}
    found |= {(64, 1, 4): {"seconds": 9.0}}  # hears the ViT alone: no point of a line
    grid.fits(table, found, ", float32")
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["slope in M, 64 px, B = 4, float32"]["slope"] == pytest.approx(0.08)
    assert rows["slope in M, 64 px, B = 4, float32"]["standalone"] == pytest.approx(0.1)
    assert rows["slope in B, 128 px, M = 8, float32"]["slope"] == pytest.approx(1.04)
    assert rows["power of pixels, student"]["power"] == pytest.approx(1.0)
    assert rows["power of pixels, teacher"]["power"] == pytest.approx(1.5)
    assert rows["power of pixels, whole step"]["power"] == pytest.approx(1.0)


def test_the_axes_of_the_grid_cross_at_the_base_and_each_has_its_line():
    assert grid.BASE in grid.AXES and set(grid.AXES) < set(grid.FULL) and len(grid.FULL) == 72
    for axis, name in enumerate(("sizes", "passes", "batches", "precisions")):
        rest = [s[:axis] + s[axis + 1 :] for s in grid.AXES]
        assert rest.count(grid.BASE[:axis] + grid.BASE[axis + 1 :]) >= 2, name
    assert [s[0] for s in grid.GRIDS["pixels"]] == list(grid.SIZES)
    assert [s[1] for s in grid.GRIDS["passes"]] == [m for m in grid.PASSES if m > 1]


@pytest.mark.slow
def test_the_grid_end_to_end(tmp_path, monkeypatch):
    """Two sizes, two M and a setting that cannot be, at a toy size: rows, and the fits of what is there."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setattr(grid, "BASE", (32, 2, 2, "float32"))
    settings = [(32, 2, 2, "float32"), (32, 4, 2, "float32"), (64, 2, 2, "float32"), (33, 2, 2, "float32")]
    table = bench.Table(str(tmp_path / "rows.json"))
    grid.measure(table, "smoke", [], seconds=0.1, settings=settings)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["33 px, M = 2, B = 2, float32"]["result"] == "failed"
    assert rows["slope in M, 32 px, B = 2, float32"]["standalone"] > 0
    assert {f"power of pixels, {part}" for part in ("student", "teacher", "whole step")} < rows.keys()


@pytest.mark.slow
def test_bench_end_to_end(tmp_path, monkeypatch, capsys):
    """The whole command at a toy size; every promised row is in the JSON, and in the table."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    file = tmp_path / "rows.json"
    args = ["--preset=smoke", "--size=32", "--batch=2", "--passes=2", "--seconds=2", "--compile=off", "--minutes=20"]
    assert bench.main([f"--json={file}", *args]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    parts = [f"part: {name}" for name in bench.PARTS]
    assert [*PROMISED, *parts, "parts_together"] == list(rows)
    for name in ("vs_pytorch", "vs_pytorch_loop"):
        assert 0 < rows[name]["low"] <= rows[name]["ratio"] <= rows[name]["high"]
    assert rows["same_losses"]["difference"] < 1e-3
    assert all(rows[name]["seconds"] > 0 for name in parts)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows)
