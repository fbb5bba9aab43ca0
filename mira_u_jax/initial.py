"""Weights of another run to start from: config.files.init names its folder.

Its averages (phi) become this run's theta and phi in place of random weights and of masked image modelling. What this run is
measured on must not have taught them.
"""

import json
import pathlib

import jax

from mira_u_jax import checkpoint, data, files, steps
from mira_u_jax import config as configuration
from mira_u_jax.errors import UserError

SAID = ("dataset", "split", "fold", "frac", "label_seed", "seed", "preset", "method", "ablate")


def load(config, names) -> dict[str, dict]:
    """{name: parameters} of those of `names` that the run in config.files.init has, on the host; UserError.

    The two must agree in their layers; size, dropout and method may differ.
    """
    folder = config.files.init
    source = settings_of(folder)
    averages, wanted = steps.abstract_params(source), steps.abstract_params(config)
    shared = [name for name in names if name in averages]
    for name in shared:
        if describe(averages[name]) != describe(wanted[name]):
            raise UserError(
                f"config key init={folder}: its {name} has other layers than this run's; take the preset and the keys"
                f" {name}.* that it was trained with"
            )
    return jax.device_get({name: checkpoint.load_ema(folder, averages)[name] for name in shared})


def describe(params) -> list:
    """Path, shape and type of each leaf."""
    return [(jax.tree_util.keystr(path), x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(params)]


def settings_of(folder):
    """The configuration of the run in `folder`; UserError."""
    try:
        return configuration.load(folder)
    except UserError as error:
        raise UserError(f"config key init={folder}: give the folder of a run of main ({error})") from None


def check(config):
    """UserError where the run in config.files.init, or one that it began with in turn, has learned from what is measured."""
    before = config
    while folder := before.files.init:
        if before is not config and not pathlib.Path(folder).exists():
            print(f"not known what {folder} learned from, with which {config.files.init} began: it is gone", flush=True)
            return
        before = settings_of(folder)
        if why := learned(before, config):
            raise UserError(f"config key init={folder}: it was trained on images that this run is measured on ({why})")


def learned(source, config) -> str:
    """Which of the images that a run of `config` is measured on a run of `source` was trained on; "" for none."""
    if config.dataset == "folder":
        held = {id: pair for id, pair in files.pairs(config.files.images, config.files.masks).items()
                if files.held_out(id, config.files.holdout)}
        known = data.trained_on(held, source)
        return f"{len(known)} of those held out, as {known[0]}" if known else ""
    if source.dataset != (config.dataset if config.split == "dev" else config.test):
        return ""
    if source.dataset == "ph2":
        return "" if source.fold == config.fold >= 0 else "four folds of PH2; take a run with the same fold"
    return "the development images; take a run with split=dev" if config.split == "dev" and source.split != "dev" else ""


def about(folder) -> dict:
    """Where the weights come from: commit, data and the keys in SAID of the run in `folder`, without paths."""
    run = json.loads((pathlib.Path(folder) / "config.json").read_text())
    settings = {key: run["config"][key] for key in SAID}
    return {"commit": run.get("commit", ""), "config": settings, "data": run.get("data", {})}
