"""The exported file without our package, its weights, and what the card says."""

import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from mira_u_jax import config as configuration
from mira_u_jax import export, steps, trained
from mira_u_jax.errors import UserError

LOADER = """
import sys
import jax, numpy as np
{}
for name in ("mira_u_jax", "flax", "tfds_builders", "einops"):
    assert name not in sys.modules
np.savez(sys.argv[3], **found)
"""
USAGE = pathlib.Path(__file__).parent.parent / "docs" / "usage.md"


@pytest.mark.parametrize("output", ["model.safetensors", "model.md", "model"])
def test_a_name_that_cannot_be(tmp_path, output):
    with pytest.raises(UserError, match="lesion.stablehlo"):
        export.export(tmp_path, tmp_path / output)


@pytest.mark.slow
def test_the_file_gives_the_same_without_our_package(smoke_run, tmp_path, tiny_data):
    """In a process that has only jax, by the lines of docs/usage.md, for two numbers of images."""
    result = {"dataset": "isic2016", "images": 12, "missed": 1, "dice": 0.8765, "ci95": {"dice": [0.81, 0.93]}}
    (smoke_run / "evaluation.json").write_text(json.dumps(result))
    (smoke_run / "temperature.json").write_text(json.dumps({"student": {"temperature": 1.7}}))
    export.export(smoke_run, tmp_path / "out" / "lesion.stablehlo", passes=3)
    (lines,) = re.findall(r"```python\n(# without mira_u_jax.*?)```", USAGE.read_text(), re.DOTALL)
    lines = lines.replace('"lesion.stablehlo"', "sys.argv[1]").replace('"images.npy"', "sys.argv[2]")
    assert len(lines.strip().splitlines()) <= 10
    run = trained.Predictor(smoke_run)
    settings, params = run.settings, run.params
    wanted = jax.jit(lambda image: trained.look(params, image, network=run.network, passes=3))
    for count in (1, 3):
        image = tiny_data["image"][:count]
        np.save(tmp_path / "images.npy", image)
        args = [tmp_path / "out" / "lesion.stablehlo", tmp_path / "images.npy", tmp_path / "found.npz"]
        subprocess.run([sys.executable, "-c", LOADER.format(lines), *args], check=True, cwd=tmp_path)
        found, own = np.load(tmp_path / "found.npz"), wanted(image)
        assert found["probability"].shape == found["sigma"].shape == (count, 32, 32)
        np.testing.assert_allclose(found["probability"], jax.nn.sigmoid(own["mean_logits"] / 1.7), atol=1e-5)
        assert abs(found["probability"] - jax.nn.sigmoid(own["mean_logits"])).max() > 1e-3
        np.testing.assert_allclose(found["sigma"], own["sigma"], atol=1e-5)
        np.testing.assert_allclose(found["logit"], own["logits"], atol=1e-4)
        assert found["probability"].std() > 1e-3

    weights = safetensors.numpy.load_file(tmp_path / "out" / "lesion.safetensors")
    leaves = {".".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert weights.keys() == leaves.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(weights[name], leaf)
    exported = jax.export.deserialize(bytearray((tmp_path / "out" / "lesion.stablehlo").read_bytes()))
    assert exported.platforms == export.PLATFORMS
    card = (tmp_path / "out" / "lesion.md").read_text()
    figures = "0.8765 | 0.8100 to 0.9300"
    for said in ("temperature 1.700", figures, "Not a medical device", "12 images", "ISIC-2016", f"{settings.size}, 3"):
        assert said in card, said
    assert str(smoke_run) not in card
    assert steps.network_names(settings) == ("student",)


def test_a_card_has_figures_of_its_own_network_only(smoke_run):
    result = {"dataset": "isic2016", "images": 12, "missed": 1, "dice": 0.8765, "ci95": {"dice": [0.81, 0.93]}}
    (smoke_run / "evaluation.json").write_text(json.dumps(result | {"network": "student"}))
    settings = configuration.load(smoke_run)
    cards = {
        name: export.card(smoke_run, "f", types.SimpleNamespace(settings=settings, name=name, temperature=t), 3, {})
        for name, t in (("student", 1.25), ("student+flips", 1.0), ("vit", 1.0))
    }
    assert "temperature 1.250" in cards["student"] and "no temperature" in cards["vit"]
    assert "0.8765" in cards["student"] and "0.8765" in cards["student+flips"]
    assert "0.8765" not in cards["vit"] and "not evaluated" in cards["vit"]


def test_a_card_says_what_the_network_learned_from(tiny_config):
    """The counts of the run; photographs of one's own are said, where they lie is not."""
    isic, folder = {"dataset": "isic2016"}, {"dataset": "folder", "test": "folder"}
    mine = {"files.images": "clinic", "files.masks": "clinic"}
    for settings, data, said in (
        (tiny_config("frac=0.1", **isic), {}, "outlines of 10% of them used, label seed 0"),
        (tiny_config(**folder, **mine), {"images": 90, "labelled": 12}, "trained it; outlines of 12 of 90 images used"),
        (tiny_config(**isic, **{"files.extra": "clinic"}), {"images": 2_000, "labelled": 90}, "2000 images, some"),
    ):
        found = export.seen(settings, data)
        assert said in found and "clinic" not in found
