"""What every test starts from: strict shapes, quick compilation, a configuration and data of a few pixels."""

import json
import re

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")  # a (c,) silently meeting (h, w, c) hides mistakes
jax.config.update("jax_disable_most_optimizations", True)  # measured: train_step compiles in 29 s instead of 77 s

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from configs import common  # noqa: E402
from mira_u_jax import checkpoint, steps  # noqa: E402
from mira_u_jax import config as configuration  # noqa: E402
from tfds_builders import build  # noqa: E402


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config("method=...", **{"teacher.passes": 1}): the smoke configuration with overrides, checked."""

    def make(arg="", /, **dotted):
        config = common.get_config("preset=smoke" + (f",{arg}" if arg else ""))
        configuration.update(config, dotted)
        return configuration.check(config)

    return make


@pytest.fixture(scope="session")
def tiny_data():
    """12 images of 32 px, each a dark ellipse on noisy skin, and their masks: {"image", "mask"}, uint8."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    centre, radius = rng.uniform(10, 22, (12, 2, 1, 1)), rng.uniform(5, 9, (12, 2, 1, 1))
    inside = ((y - centre[:, 0]) / radius[:, 0]) ** 2 + ((x - centre[:, 1]) / radius[:, 1]) ** 2 < 1
    colour = np.where(inside[..., None], [110, 70, 60], [220, 180, 160]) + rng.normal(0, 10, (12, 32, 32, 3))
    return {"image": colour.clip(0, 255).astype(np.uint8), "mask": np.where(inside, 255, 0).astype(np.uint8)}


@pytest.fixture(scope="session")
def synthetic_data_dir(tmp_path_factory):
    """A data_dir that holds the embedded set at 128 px; about 20 s, for slow tests."""
    folder = tmp_path_factory.mktemp("data")
    build.prepare("synthetic_lesions", config="128px", data_dir=folder)
    return str(folder)


@pytest.fixture(scope="session")
def networks(tiny_config):
    """(networks, params) of the smoke configuration, stage "train"; drawn once, never to be changed in place."""
    config = tiny_config()
    names = steps.network_names(config)
    return steps.make_networks(names, "train", config), steps.init_params(names, "train", config, jax.random.key(0))


@pytest.fixture(scope="session")
def pretrain_params(tiny_config):
    """Parameters of the smoke configuration's two masked autoencoders."""
    return steps.init_params(("student", "vit"), "pretrain", tiny_config(), jax.random.key(0))


@pytest.fixture(scope="session")
def reached_bias_rows():
    """reached_bias_rows(path, size): which rows of a `relative_bias` table a map can use, None for any other leaf.

    A window of 8 has 15 x 15 offsets; a map of 4 cells a side meets those of -3..3 only, the rest get no gradient. `path`
    is the leaf's as a string; the smoke student's stage and skip i have stride 2 ** i.
    """

    def rows(path, size, window=8):
        if "relative_bias" not in path:
            return None
        level = int(re.search(r"\[(\d)\]", path)[1])
        reach = np.abs(np.arange(2 * window - 1) - (window - 1)) < min(window, size // 2**level)
        return (reach[:, None] & reach[None]).reshape(-1)

    return rows


@pytest.fixture
def smoke_run(tmp_path, tiny_config):
    """A workdir as main leaves it, untrained: configuration and checkpoint of a fresh supervised student."""
    config = tiny_config("method=supervised", dataset="isic2016")
    names = steps.network_names(config)
    params = steps.init_params(names, "train", config, jax.random.key(0))
    state = steps.init_state(params, steps.make_optimizer(config.optim, names, lambda _: 0.0), config.optim)
    configuration.save(config, tmp_path / "run", {"commit": "abc", "versions": {"jax": jax.__version__}})
    with checkpoint.open_manager(tmp_path / "run", "train") as manager:
        checkpoint.save(manager, 1, state)
    return tmp_path / "run"


@pytest.fixture
def results(tmp_path):
    """results(arg, dice, **dotted): the path of a result as grid keeps it, in results.folder; made up around a Dice.

    images: {id: Dice} for the CSV beside it; also: {data set: Dice}. Precision, recall and IoU fit the Dice.
    """
    folder = tmp_path / "results" / "a"
    folder.mkdir(parents=True)

    def evaluation(dice):
        curve = {"share": [0.6, 0.4], "p": [0.1, 0.9], "lesion": [0.05, 0.95]}
        return {
            "images": 3, "dice": dice, "iou": dice / (2 - dice), "precision": dice, "recall": dice, "failure_rate": 0.1,
            "missed": 2, "hd95": 5.0, "ause": 0.01, "ause_entropy": 0.012, "sigma": 0.02, "reliability": curve,
            "error_by_sigma": {"share": [1.0], "sigma": [0.1], "wrong": [0.2]}, "ci95": {"dice": [dice - 0.02, dice + 0.01]},
        }

    def make(arg, dice, *, images=None, also=None, **dotted):
        config = common.get_config(arg)
        configuration.update(config, dotted)
        path = folder / f"{len(list(folder.glob('*.json')))}.json"
        path.write_text(json.dumps({
            "config": json.loads(config.to_json()), "evaluation": evaluation(float(dice)), "commit": "c" * 40,
            "hardware": "1 x cpu", "seconds": 60, "also": {name: evaluation(value) for name, value in (also or {}).items()},
        }))
        if images:
            rows = [f"{name},{value}" for name, value in images.items()]
            path.with_suffix(".csv").write_text("\n".join(["id,dice", *rows]) + "\n")
        return path

    make.folder = tmp_path / "results"
    return make
