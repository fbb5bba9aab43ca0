"""Every name of paper.md, section 5: the document says its switches, and it runs from end to end."""

import pathlib
import re

import jax
import numpy as np
import pytest

from configs import common
from mira_u_jax import checkpoint, steps, train
from mira_u_jax import config as configuration
from tfds_builders import build

ROOT = pathlib.Path(__file__).parent.parent
REAL = ROOT.parent / "shared/data/isic2016_256px"
NAMES = [("method", name) for name in common.METHODS] + [("ablate", name) for name in common.ABLATIONS]


def documented() -> dict[str, dict[str, str]]:
    """{name: {dotted key: value as text}} of the two tables of section 5."""
    section = (ROOT / "docs/paper.md").read_text().split("## 5. ")[1].split("## 6. ")[0]
    rows = (line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `"))
    return {row[0].split("`")[1]: dict(re.findall(r"`([\w.]+)=([^`]*)`", row[1])) for row in rows if len(row) == 4}


def difference(key, name) -> dict:
    """{dotted key: value} in which a name's configuration differs from mira_u's, preset cpu (M = 4)."""
    ours, theirs = (configuration.flat(common.get_config(f"preset=cpu{arg}")) for arg in ("", f",{key}={name}"))
    assert ours.keys() == theirs.keys()
    return {k: v for k, v in theirs.items() if v != ours[k] and k != key}


def test_the_document_lists_every_name_and_no_other():
    assert documented().keys() == common.METHODS.keys() | common.ABLATIONS.keys()


@pytest.mark.parametrize(("key", "name"), NAMES)
def test_a_name_changes_what_the_document_says_and_nothing_else(key, name):
    found, wanted = difference(key, name), documented()[name]
    assert found.keys() == wanted.keys()
    for dotted, value in found.items():
        text = wanted[dotted]
        if isinstance(value, float):
            assert float(text) == pytest.approx(value, abs=5e-5), dotted
        else:
            assert text == (",".join(value) if isinstance(value, list) else str(value)), dotted
    assert (name == "mira_u") == (not found)


@pytest.fixture(scope="module")
def images(tmp_path_factory, request):
    """(file of configs, data_dir): real images where they are, else the drawn ones."""
    if not REAL.is_dir():
        return "synthetic", request.getfixturevalue("synthetic_data_dir")
    folder = tmp_path_factory.mktemp("real")
    build.prepare("isic2016", config="128px", data_dir=folder, manual_dir=REAL)
    return "isic", str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Names share programs: masked image modelling is compiled once for all of them."""
    folder = str(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "name"), NAMES)
def test_every_name_runs(tmp_path, images, cache, key, name):
    """Both stages at smoke size, on real images where they are: every leaf of theta and of phi has moved and is finite."""
    file, data_dir = images
    arg = f"frac=0.1,preset=smoke,{key}={name},data_dir={data_dir}"
    module = __import__(f"configs.{file}", fromlist=["get_config"])
    config = module.get_config(arg)
    config = configuration.check(config)
    state = train.run(config, tmp_path)
    names = steps.network_names(config)
    assert int(state.step) == 6 and set(state.params) == set(names)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.ema)))
    start = steps.init_params(names, "train", config, jax.random.key(config.seed))
    for network in names:
        for now in (state.params, state.ema):
            moved = jax.tree.map(lambda a, b: (np.asarray(a) != np.asarray(b)).any(), start[network], now[network])
            assert all(jax.tree.leaves(moved)), network
    assert checkpoint.load_ema(tmp_path, steps.abstract_params(config)).keys() == set(names)
    assert (tmp_path / "figures/curves.png").stat().st_size > 0
