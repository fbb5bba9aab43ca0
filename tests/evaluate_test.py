"""What a run is measured by: its maps, the figures of each image, and the object of all of them."""

import csv
import dataclasses
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from ml_collections import FrozenConfigDict
from PIL import Image
from scipy.special import expit

from mira_u_jax import (
    boundary,
    calibration,
    checkpoint,
    config,
    data,
    equations,
    evaluate,
    metrics,
    pseudo,
    runs,
    steps,
    trained,
)
from mira_u_jax.errors import UserError
from mira_u_jax.rng import named

PROMISED = {  # in results/*.json and DIR/evaluation.json, for whoever reads them
    "dataset", "images", "dice", "iou", "accuracy", "precision", "recall", "dice_pooled", "iou_pooled", "hd95", "assd",
    "missed", "failure_rate", "ece", "ause", "ci95",
}


def workdir_with(params, settings, workdir):
    """A workdir that holds a run of these fresh networks."""
    config.save(settings, workdir, {"commit": "none"})
    state = steps.init_state(params, steps.make_optimizer(settings.optim, params, lambda _: 0.0), settings.optim)
    with checkpoint.open_manager(workdir, "train") as manager:
        checkpoint.save(manager, 0, state)
    return workdir


@pytest.fixture(scope="module")
def run(tiny_config, networks, tmp_path_factory):
    params = {"student": networks[1]["student"]}
    return workdir_with(params, tiny_config("method=supervised"), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    """Seven of the tiny images; masks with images of 48 x 80, so that logits are resampled, one of them empty."""
    path = tmp_path_factory.mktemp("folder")
    for part in ("images", "masks"):
        (path / part).mkdir()
    for i in range(7):
        image, mask = (cv2.resize(tiny_data[part][i], (80, 48)) for part in ("image", "mask"))
        Image.fromarray(image).save(path / "images" / f"{i}.png")
        Image.fromarray(np.where(mask > 127, 255, 0).astype(np.uint8) * (i != 3)).save(path / "masks" / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def measured(run, folder):
    """(object, rows of the CSV, number of programs compiled for prediction) of one evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        compiled, traced = [], trained.look
        patch.setattr(trained, "look", lambda *args, **kwargs: compiled.append(1) or traced(*args, **kwargs))
        patch.setattr(trained, "PIXELS", 3 * 32 * 32)  # batches of 3: two whole ones and a rest
        found = evaluate.evaluate(run, str(folder), images_csv=run / "images.csv")
    with (run / "images.csv").open() as file:
        return found, list(csv.DictReader(file)), len(compiled)


def test_the_object(measured):
    found, rows, compiled = measured
    assert set(found) >= PROMISED and compiled == 1
    assert found["images"] == len(rows) == 7 and [row["id"] for row in rows] == [str(i) for i in range(7)]
    assert found["passes"] == 2 and found["network"] == "student"
    assert not found["flips"] and not found["largest"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, (low, high) in found["ci95"].items():
        assert low <= found[name] <= high or name.startswith("ece"), name  # resampled sums of |.| lie above their own
    for name in evaluate.AVERAGED + ("dice", "iou"):
        assert found[name] == pytest.approx(np.mean([float(row[name]) for row in rows]), rel=1e-4), name
    counts = np.array([[int(row[name]) for name in evaluate.COUNTED] for row in rows])
    assert (counts.sum(1) == 48 * 80).all() and counts[3, 0] == counts[3, 2] == 0
    assert found["dice"] == pytest.approx(metrics.scores(counts)["dice"].mean())
    assert found["temperature"] is None and "ece_calibrated" not in found  # no labelled images at hand, none promised


def test_the_doubt_of_runs_older_than_it_is_read_from_their_images(measured, run, tmp_path):
    found, rows, _ = measured
    old = {k: v for k, v in found.items() if k not in ("failure_auroc", "dice_surest")}
    settings = json.loads((run / "config.json").read_text())["config"]
    (tmp_path / "old.json").write_text(json.dumps({"config": settings, "evaluation": old}))
    kept = [{k: v for k, v in row.items() if "doubt" not in k} for row in rows]
    evaluate.write_rows(tmp_path / "old.csv", kept)
    (known,) = runs.load([tmp_path])
    for name in ("failure_auroc", "dice_surest"):
        assert (known.figure(name) is None) == (name not in found)
        assert known.figure(name) == pytest.approx(found.get(name), abs=1e-3)
    assert known.figure("dice") == found["dice"] and known.figure("nothing") is None


class Drop:
    """A network that sees where it is: the red channel times a slope over the image, and noise for a dropout key."""

    def __call__(self, params, image, key=None):
        return self.outputs(params, image, key=key)[0]

    def outputs(self, params, image, key=None):
        noise = 0 if key is None else 2 * jax.random.normal(key, image.shape[:1] + (1, 1))
        z = (image[..., 0] - 0.5) * params + noise
        return jnp.stack([z, z - 9])[:1]


SLOPE = jnp.linspace(-3, 8, 32)[None, None] * jnp.linspace(1, 3, 32)[None, :, None]


def test_maps_are_the_network_without_dropout_and_its_passes(tiny_data):
    image, network = tiny_data["image"][:3], Drop()
    found = trained.look(SLOPE, image, network=network, passes=6)
    x = steps.to_float(jnp.asarray(image))
    np.testing.assert_allclose(found["logits"], network(SLOPE, x), rtol=1e-4, atol=1e-5)
    key = named(jax.random.key(0), "predict")
    p = jnp.concatenate([pseudo.teacher_passes(network, SLOPE, x[i : i + 1], key, 6) for i in range(3)], 1)
    np.testing.assert_allclose(expit(found["mean_logits"]), p.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["sigma"], equations.mean_and_deviation(p)[1], rtol=1e-4, atol=1e-5)
    assert found["sigma"].mean() > 0.05 and (found["mean_logits"] > 0).mean() != (found["logits"] > 0).mean()
    alone = trained.look(SLOPE, image[2:], network=network, passes=6)
    np.testing.assert_allclose(alone["sigma"][0], found["sigma"][2], rtol=1e-4, atol=1e-5)


def test_logits_of_what_is_sure_are_finite():
    found = equations.to_logits(np.array([0, 0.25, 1], np.float32))
    np.testing.assert_allclose(found, [-13.8, np.log(1 / 3), 13.8], rtol=2e-2)
    assert np.abs(found).max() < calibration.REACH


def test_flips_average_the_logits_of_the_four_views(tiny_data):
    image, wanted = steps.to_float(jnp.asarray(tiny_data["image"][:3])), 0
    mirrored = trained.Mirrored(Drop())
    for vertical in (1, -1):
        for horizontal in (1, -1):
            view = image[:, ::vertical, ::horizontal]
            wanted += np.asarray(Drop()(SLOPE, view))[:, ::vertical, ::horizontal] / 4
    np.testing.assert_allclose(mirrored(SLOPE, image), wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(wanted - Drop()(SLOPE, image)).max() > 0.1
    np.testing.assert_allclose(mirrored(SLOPE, image[:, ::-1]), wanted[:, ::-1], rtol=1e-4, atol=1e-5)  # equivariant


def test_networks_together_average_logits_and_count_all_passes(tiny_data):
    image, params = steps.to_float(jnp.asarray(tiny_data["image"][:3])), {"student": SLOPE, "vit": 3 - SLOPE}
    both = trained.Together((("student", trained.Mirrored(Drop())), ("vit", Drop())))
    apart = [trained.Mirrored(Drop())(SLOPE, image), Drop()(3 - SLOPE, image)]
    np.testing.assert_allclose(both(params, image), (apart[0] + apart[1]) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both.outputs(params, image), apart, rtol=1e-4, atol=1e-5)
    key = jax.random.key(1)
    noisy = both.outputs(params, image, key=key)
    np.testing.assert_allclose(noisy[1], Drop()(3 - SLOPE, image, key=named(key, "vit")), rtol=1e-4, atol=1e-5)
    p = pseudo.teacher_passes(both, params, image, key, 5)
    assert p.shape[0] == 10 and np.unique(np.asarray(p)[:, 0, 0, 0]).size == 10  # each pass of each network is its own


def test_all_networks_of_a_run(run, tiny_config, networks, tmp_path):
    """The mean of both, with the parameters of both; of a run without a ViT the student alone."""
    workdir = workdir_with(networks[1], tiny_config(""), tmp_path)
    found = [trained.Predictor(workdir, name) for name in trained.NETWORKS]
    image = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), np.uint8)
    every = jax.jit(lambda image: [steps.eval_step(f.params, image, network=f.network) for f in found])
    student, vit, both = every(image)
    np.testing.assert_allclose(both, (student + vit) / 2, rtol=1e-3, atol=1e-4)
    assert np.abs(student - vit).max() > 1e-3 and found[2].name == "all" and set(found[2].params) == {"student", "vit"}
    assert [name for name, _ in trained.Predictor(run, "all").network.networks] == ["student"]


def test_flips_are_the_runs_unless_said(run):
    assert [trained.Predictor(run, flips=flips).flips for flips in (None, True)] == [False, True]
    assert trained.Predictor(run, flips=True).name == "student+flips"
    assert [trained.Predictor(run, largest=largest).largest for largest in (None, True)] == [False, True]


@dataclasses.dataclass
class Measured:
    """Maps of 16 px and a truth of 40 x 64 by which each figure is known."""

    found: dict
    truth: np.ndarray


@pytest.fixture
def known():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    logits = (5 - np.hypot(y - 8, x - 7)).astype(np.float32)
    mean = (logits + rng.normal(0, 0.3, logits.shape)).astype(np.float32)
    sigma = rng.uniform(0, 0.4, logits.shape).astype(np.float32)
    truth = np.zeros((40, 64), bool)
    truth[8:34, 14:44] = True
    return Measured({"logits": logits, "mean_logits": mean, "sigma": sigma}, truth)


def test_an_image_is_measured_at_the_masks_resolution(known):
    row, tables = evaluate.measure(known.found, known.truth)
    z, mean, sigma = (cv2.resize(known.found[name], (64, 40)) for name in ("logits", "mean_logits", "sigma"))
    predicted = z > 0  # from the pass without dropout, whatever the mean says
    wrong, band = predicted != known.truth, boundary.band(predicted)
    assert 0 < wrong.sum() < 400 and 0 < band.sum() < band.size
    assert row["dice"] == pytest.approx(2 * (predicted & known.truth).sum() / (predicted.sum() + known.truth.sum()))
    assert row["hd95"] == boundary.distances(predicted, known.truth)["hd95"]
    assert row["brier"] == pytest.approx(((expit(mean) - known.truth) ** 2).mean(), rel=1e-5)
    assert row["ause"] == calibration.ause(sigma, wrong)
    p = expit(mean.astype(np.float64))
    assert row["ause_entropy"] == pytest.approx(calibration.ause(1 - np.abs(2 * p - 1), wrong), abs=1e-6)
    assert row["doubt"] == pytest.approx(sigma.sum() / predicted.sum(), rel=1e-5)
    assert row["doubt_entropy"] == pytest.approx((1 - np.abs(2 * p - 1)).sum() / predicted.sum(), rel=1e-5)
    assert row["sigma"] == pytest.approx(sigma.mean()) and row["sigma_band"] == pytest.approx(sigma[band].mean())
    np.testing.assert_allclose(tables["all"], calibration.histogram(mean, known.truth), rtol=1e-6)
    np.testing.assert_allclose(tables["band"], calibration.histogram(mean, known.truth, band), rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_part_is_scipys(seed):
    """Speckles of all sizes; parts that touch at a corner are one."""
    logits = np.random.default_rng(seed).normal(-0.9, 1, (40, 30)).astype(np.float32)
    logits = np.maximum(logits, np.roll(logits, (1, 1), (0, 1)))
    parts, count = scipy.ndimage.label(logits > 0, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    assert count > 3 and (sizes == sizes.max()).sum() == 1
    np.testing.assert_array_equal(trained.mask_of(logits, largest=True), parts == 1 + sizes.argmax())
    np.testing.assert_array_equal(trained.mask_of(logits, largest=False), logits > 0)


def test_no_lesion_has_no_largest_part_and_one_lesion_is_it(known):
    assert not trained.mask_of(np.full((5, 6), -1.0), largest=True).any()
    np.testing.assert_array_equal(trained.mask_of(known.found["logits"], largest=True), known.found["logits"] > 0)


def test_the_largest_part_is_what_is_measured(known):
    """A speckle in a corner changes the figures, and with largest=True it does not."""
    row, _ = evaluate.measure(known.found, known.truth)
    known.found["logits"][:2, :2] = 3.0
    spoilt, _ = evaluate.measure(known.found, known.truth)
    mended, _ = evaluate.measure(known.found, known.truth, largest=True)
    assert spoilt["fp"] > row["fp"] == mended["fp"] and spoilt["hd95"] > row["hd95"]
    assert mended["dice"] == row["dice"] > spoilt["dice"]


def test_an_empty_prediction_is_measured_too(known):
    known.found["logits"] = np.full((16, 16), -3.0, np.float32)
    row, tables = evaluate.measure(known.found, known.truth)
    assert row["dice"] == 0 and row["hd95"] == row["assd"] == 100 and row["sigma_band"] == 0
    found = evaluate.summary([row, row], [tables, tables])
    assert found["missed"] == 2 and found["ece_band"] == 0 and found["failure_rate"] == 1
    assert "failure_auroc" not in found and found["aurc"] == 1  # all failed: nothing to tell apart
    json.dumps(found, allow_nan=False)


def test_the_doubt_of_images_is_measured_by_what_it_finds(known):
    """Of two images the bad one is the more doubtful: found in every resample that has both."""
    good, tables = evaluate.measure(known.found, known.truth)
    bad = good | {"iou": 0.2, "dice": 1 / 3, "tp": 10, "fp": 20, "fn": 20, "doubt": 9.0, "doubt_entropy": 0.0}
    found = evaluate.summary([good, bad, good], [tables] * 3)
    assert found["failure_auroc"] == 1 and found["failure_auroc_entropy"] == 0
    assert found["dice_surest"] > found["dice"] and found["aurc"] < 1 - found["dice"] < found["aurc_entropy"]
    assert found["ci95"]["failure_auroc"] == [1, 1]


def test_a_temperature_changes_the_calibrated_figures_only(known):
    row, tables = evaluate.measure(known.found, known.truth)
    plain, cooled = evaluate.summary([row], [tables]), evaluate.summary([row], [tables], 3.0)
    assert {k for k in cooled if k not in plain} == {"ece_calibrated", "ece_band_calibrated"}
    assert all(cooled[k] == plain[k] for k in plain if k not in ("temperature", "ci95"))
    cooler = cv2.resize(known.found["mean_logits"] / 3, (64, 40))
    wanted = calibration.reliability(calibration.histogram(cooler, known.truth))
    assert cooled["ece_calibrated"] == pytest.approx(float(calibration.ece(wanted)), abs=2e-3) != cooled["ece"]


@pytest.fixture
def training(tiny_data, monkeypatch):
    """A training set whose rows 1, 4 and 5 are labelled; the data_dirs it was asked of."""
    rows = [{"image": i, "mask": m} for i, m in zip(tiny_data["image"], tiny_data["mask"], strict=True)]
    asked = []

    def training_set(settings):
        asked.append(settings.data_dir)
        return data.TrainingSet(rows, np.array([1, 4, 5]), np.arange(12), "")

    monkeypatch.setattr(data, "training_set", training_set)
    return asked


class Red:
    """A predictor whose logits are the red channel."""

    name, settings = "student", FrozenConfigDict({"data_dir": "elsewhere", "files": {"extra": ""}})

    def __call__(self, examples):
        for example in examples:
            yield example, {"mean_logits": 0.05 * (120.0 - example.image[..., 0])}


def test_temperature_comes_from_the_labelled_images_and_is_kept(tmp_path, tiny_data, training, monkeypatch):
    assert evaluate.temperature(tmp_path, Red(), "there", at_hand=False) == {}
    found = evaluate.temperature(tmp_path, Red(), "there", at_hand=True)
    assert found["images"] == 3 and training == ["there"] and not (tmp_path / "temperature.json").exists()
    histograms = [
        calibration.histogram(0.05 * (120.0 - tiny_data["image"][i][..., 0]), tiny_data["mask"][i] / 255) for i in (1, 4, 5)
    ]
    wanted = calibration.out_of_fold(np.stack(histograms))
    assert found.pop("folds") == pytest.approx(wanted.pop("folds"), rel=1e-3) and found == pytest.approx(wanted, rel=1e-3)
    assert found["temperature"] != 1
    kept = evaluate.temperature(tmp_path, Red(), "there", at_hand=True, refit=True)
    assert evaluate.temperature(tmp_path, Red(), "", at_hand=False) == kept and len(training) == 2
    assert kept["temperature"] == found["temperature"]
    (tmp_path / "temperature.json").write_text("")  # cut off by what wrote files before
    assert evaluate.temperature(tmp_path, Red(), "there", at_hand=True, refit=True) == kept
    assert evaluate.temperature(tmp_path, Red(), "", at_hand=False) == kept

    def gone(settings):
        raise UserError("the folder is not here")

    monkeypatch.setattr(data, "training_set", gone)
    (tmp_path / "temperature.json").unlink()
    assert evaluate.temperature(tmp_path, Red(), "", at_hand=True) == {}
    with pytest.raises(UserError, match="not here"):
        evaluate.temperature(tmp_path, Red(), "", at_hand=True, refit=True)


def test_a_run_from_before_the_keys_is_measured_as_they_default(run, tmp_path):
    old = json.loads((run / "config.json").read_text())
    del old["config"]["evaluation"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    predictor = trained.Predictor(tmp_path)
    assert predictor.passes == 8 and not predictor.flips


def test_only_the_images_that_are_drawn_are_looked_at_again(run, folder, measured):
    predictor, examples = trained.Predictor(run), data.folder(folder, 32)
    dice = np.array([float(row["dice"]) for row in measured[1]])
    picked = evaluate.best_middle_worst(dice, each=1)
    assert len(set(picked)) == 3 and np.argmax(dice) == picked[0] and dice[picked[-1]] == dice.min()
    seen = evaluate.look_again(predictor, examples, picked)
    maps = [found for _, found in predictor(examples)]
    assert seen.keys() == set(picked)
    for i, (id, image, truth, logits, sigma) in seen.items():
        assert id == str(i) and (image == examples[i].image).all() and truth.shape == (32, 32)
        np.testing.assert_array_equal(logits, maps[i]["logits"])
        np.testing.assert_array_equal(sigma, maps[i]["sigma"])
    kept = json.loads(next((run / "cases").glob("*/cases.json")).read_text())["cases"]
    pictures = sorted((row for row in kept if "picture" in row), key=lambda row: row["picture"])
    assert len(kept) == len(pictures) == 7 and [row["dice"] for row in pictures] == sorted(row["dice"] for row in kept)
    np.testing.assert_allclose([row["dice"] for row in kept], dice, atol=1e-4)


def test_masks_of_the_other_polarity_are_told_of(run, folder, tmp_path, capsys):
    (tmp_path / "images").symlink_to(folder / "images")
    (tmp_path / "masks").mkdir()
    for i in range(7):
        mask = np.pad(np.full((28, 40), 255, np.uint8), ((10, 10), (20, 20)))
        Image.fromarray(255 - mask if i < 4 else mask).save(tmp_path / "masks" / f"{i}.png")
    evaluate.evaluate(run, str(tmp_path))
    assert "warning: in most masks" in capsys.readouterr().out
    for i in range(4):  # a lesion that fills the picture is no mistake
        Image.fromarray(np.full((48, 80), 255, np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    evaluate.evaluate(run, str(tmp_path))
    assert "warning" not in capsys.readouterr().out


def test_development_images_that_a_run_has_learnt_from_are_not_measured_on(smoke_run):
    with pytest.raises(UserError, match="--split=dev: this run has trained on"):
        evaluate.evaluate(smoke_run, "isic2016", split="dev")


def test_a_folder_has_no_development_images(smoke_run, folder):
    with pytest.raises(UserError, match="--split=dev: .* has no development images"):
        evaluate.evaluate(smoke_run, str(folder), split="dev")
