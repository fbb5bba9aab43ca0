"""Weights of another run to start from: config.files.init names its folder.

Its averages (phi) become this run's theta and phi in place of random weights and of masked image modelling. What this run is
measured on must not have taught them.
"""

import json
import pathlib

import jax
from ml_collections import FrozenConfigDict

from mira_u_jax import checkpoint, cluster, data, learned, steps, whole
from mira_u_jax import config as configuration
from mira_u_jax.errors import UserError

FILE = "init.json"
SAID = ("dataset", "split", "fold", "frac", "label_seed", "seed", "preset", "method", "ablate")


def source(config) -> tuple[pathlib.Path, FrozenConfigDict]:
    """(folder, configuration) of the run in config.files.init; UserError."""
    folder = pathlib.Path(config.files.init).expanduser()
    if not (folder / "config.json").is_file() or not checkpoint.begun(folder, "train"):
        raise UserError(f"config key init={folder}: give the folder of a run of main that has saved weights of stage 2")
    return folder, configuration.load(folder)


def shapes(config, names, *, whose: str):
    """Abstract parameters of those of `names` that a run of `config` has."""
    try:
        return steps.abstract_params(config, [name for name in names if name in steps.network_names(config)])
    except UserError as error:
        raise UserError(f"config key init: {whose} is {error}") from None


def check(config) -> learned.Images:
    """What the run in config.files.init has learned from; asked before anything is written.

    UserError where there is none, where a network has other layers than this run's, and where it has learned from what this
    run is measured on.
    """
    folder, before = source(config)
    names = steps.network_names(config)
    wanted = shapes(config, names, whose="this one")
    for name, found in shapes(before, names, whose=str(folder)).items():
        if described(found) != described(wanted[name]):
            raise UserError(
                f"config key init={folder}: its {name} has other layers than this run's; take the preset and the keys"
                f" {name}.* that it was trained with"
            )
    known = learned.of(folder, before)
    measured = data.measured_on(config)
    taught = data.evaluation_set(measured, config, split=config.split, data_dir=config.data_dir, known=known).left_out
    if taught:
        hint = "a run with split=dev" if config.split == "dev" else "another run"
        raise UserError(
            f"config key init={folder}: it has learned from {len(taught)} of the images that this run is measured on, as"
            f" {taught[0]}; take {hint}"
        )
    return known


def take(workdir, config, names) -> dict[str, dict]:
    """{name: parameters} of those of `names` that the run in config.files.init has, on the host; DIR/init.json says of what.

    UserError where that run has gone on since this one began.
    """
    folder, before = source(config)
    averages = checkpoint.load_ema(folder, shapes(before, names, whose=str(folder)))
    if cluster.first():
        about = {"weights": sum(checkpoint.checksums(averages).values()) % 2**53} | described_run(folder)
        path = pathlib.Path(workdir) / FILE
        if path.exists() and json.loads(path.read_text())["weights"] != about["weights"]:
            raise UserError(
                f"config key init={folder}: its weights are others than those that {workdir} began with; give another"
                " --workdir to begin with these"
            )
        whole.write(path, json.dumps(about, indent=1) + "\n")
    return jax.device_get(averages)


def described(params) -> list:
    """Path, shape and type of each leaf."""
    return [(jax.tree_util.keystr(path), x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(params)]


def described_run(folder: pathlib.Path) -> dict:
    """Commit, data and the keys in SAID of the run in `folder`, and with what that run began; no path."""
    run = json.loads((folder / "config.json").read_text())
    about = {"commit": run.get("commit", ""), "config": {k: run["config"][k] for k in SAID if k in run["config"]}}
    about["data"] = run.get("data", {})
    return about | ({"init": json.loads((folder / FILE).read_text())} if (folder / FILE).exists() else {})
