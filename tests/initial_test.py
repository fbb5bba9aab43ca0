"""Weights of another run: they arrive whole, and nothing that is measured has taught them."""

import json

import jax
import numpy as np
import pytest
from files_test import NAMES, config, mine  # noqa: F401 - a fixture

from mira_u_jax import checkpoint, data, files, initial, steps, train
from mira_u_jax import config as configuration
from mira_u_jax.errors import Preempted, UserError


def saved(settings, workdir):
    """A workdir with random networks of these settings: theta by its seed, phi another."""
    names = steps.network_names(settings)
    params, averages = (steps.init_params(names, "train", settings, jax.random.key(seed)) for seed in (5, 6))
    state = steps.init_state(params, steps.make_optimizer(settings.optim, names, lambda _: 0.0), settings.optim)
    configuration.save(settings, workdir, {"commit": "abc"}, {"images": 9, "labelled": 2, "digest": "d"})
    with checkpoint.open_manager(workdir, "train") as manager:
        checkpoint.save(manager, 1, state.replace(ema=averages))
    return averages


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def test_averages_of_the_networks_that_both_have(tiny_config, tmp_path):
    """At another size, dropout and method; a supervised run takes the student alone, MIRA-U has to find a ViT itself."""
    both, student = saved(tiny_config(), tmp_path / "both"), saved(tiny_config("method=supervised"), tmp_path / "student")
    for arg, source, averages, names in (
        ("", "both", both, ["student", "vit"]), ("method=supervised", "both", both, ["student"]),
        ("", "student", student, ["student"]),
    ):
        settings = tiny_config(arg, size=64, **{"files.init": str(tmp_path / source), "student.dropout": 0.3})
        found = initial.load(settings, steps.network_names(settings))
        assert list(found) == names and all(same(found[name], averages[name]) for name in names)


def test_other_layers_are_refused(tiny_config, tmp_path):
    saved(tiny_config(), tmp_path)
    for name, key, value in (("student", "student.widths", (8, 8, 16, 16, 24)), ("vit", "vit.depth", 2)):
        settings = tiny_config(**{"files.init": str(tmp_path), key: value})
        with pytest.raises(UserError, match=f"init=.*: its {name} has other layers"):
            initial.load(settings, ("student", "vit"))


@pytest.mark.parametrize(("source", "target", "why"), [
    ({"dataset": "isic2016"}, {"dataset": "isic2016", "split": "dev"}, "development images; take a run with split=dev"),
    ({"dataset": "isic2016", "split": "dev"}, {"dataset": "isic2016", "split": "dev"}, None),
    ({"dataset": "isic2016"}, {"dataset": "isic2016"}, None),
    ({"dataset": "isic2016"}, {"dataset": "isic2016", "test": "ph2"}, None),
    ({"dataset": "ph2", "test": "ph2", "fold": 1}, {"dataset": "isic2016", "test": "ph2"}, "same fold"),
    ({"dataset": "ph2", "test": "ph2", "fold": 1}, {"dataset": "ph2", "test": "ph2", "fold": 2}, "same fold"),
    ({"dataset": "ph2", "test": "ph2", "fold": 1}, {"dataset": "ph2", "test": "ph2", "fold": 1}, None),
])
def test_what_is_measured_has_taught_nothing(tiny_config, tmp_path, source, target, why):
    """Nor the run with which that run began."""
    before = tiny_config(**source)
    configuration.save(before, tmp_path / "first", {})
    drawn = {"dataset": "synthetic_lesions", "test": "synthetic_lesions", "files.init": str(tmp_path / "first")}
    configuration.save(tiny_config(**drawn), tmp_path / "second", {})
    for folder in ("first", "second"):
        settings = tiny_config(**target, **{"files.init": str(tmp_path / folder)})
        if why is None:
            initial.check(settings)
            continue
        with pytest.raises(UserError, match=f"init=.*first: it was trained on images .*{why}"):
            initial.check(settings)
    with pytest.raises(UserError, match="init=.*nobody: give the folder of a run of main"):
        initial.check(tiny_config(**{"files.init": str(tmp_path / "nobody")}))


def test_what_a_folder_holds_out_has_taught_nothing(mine, capsys):  # noqa: F811
    configuration.save(config(mine, holdout=0), mine / "all", {})
    configuration.save(config(mine, holdout=0.4), mine / "most", {})
    held = [name for name in NAMES[:8] if files.held_out(name, 0.4)]
    with pytest.raises(UserError, match=f"{len(held)} of those held out, as {held[0]}"):
        initial.check(config(mine, holdout=0.4, init=mine / "all"))
    initial.check(config(mine, holdout=0.4, init=mine / "most"))
    (mine / "most" / "config.json").write_text((mine / "most" / "config.json").read_text().replace(
        '"init": ""', f'"init": "{mine / "gone"}"'))
    initial.check(config(mine, holdout=0.4, init=mine / "most"))
    assert "not known what" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_begins_with_them_and_goes_on_without(tiny_config, mine, monkeypatch):  # noqa: F811
    """Nothing is pretrained; where the source is gone a run goes on; what is kept says where the weights are from."""
    averages = saved(tiny_config(dataset="isic2016"), mine / "isic")
    settings = config(mine, init=mine / "isic")
    begun = {}

    def watched(run, names, params):
        begun.update(jax.device_get(params))
        return stage(run, names, params)

    stage = train.Run.train
    monkeypatch.setattr(train.Run, "train", watched)
    monkeypatch.setattr(train, "Notice", lambda: Leave(after=2))
    with pytest.raises(Preempted):
        train.run(settings, mine / "run")
    assert same(begun, averages) and not checkpoint.folder(mine / "run", "pretrain").exists()
    (mine / "isic").rename(mine / "moved")
    monkeypatch.setattr(train, "Notice", lambda: Leave(after=99))
    state = train.run(settings, mine / "run")
    assert int(state.step) == settings.train.steps
    known = json.loads((mine / "run" / "init.json").read_text())
    assert known["commit"] == "abc" and known["config"]["dataset"] == "isic2016" and str(mine) not in json.dumps(known)


class Leave:
    """A preemption notice that comes after so many questions."""

    def __init__(self, after):
        self.left, self.told = after, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self):
        self.left -= 1
        self.told = self.left <= 0
        return self.told


def test_images_that_moved_are_the_same_run_and_others_are_not(mine, tmp_path):  # noqa: F811
    """The digest tells: a run goes on with its folder elsewhere, and not with another folder in its place."""
    def begin(settings):
        digest = data.training_set(settings).digest
        configuration.save(settings, tmp_path / "run", {}, {"images": 12, "labelled": 8, "digest": digest})

    begin(config(mine))
    (mine / "images").rename(mine / "elsewhere")
    begin(config(mine, images=mine / "elsewhere"))
    assert configuration.load(tmp_path / "run").files.images == str(mine / "elsewhere")
    (mine / "elsewhere" / f"{NAMES[10]}.png").unlink()
    with pytest.raises(UserError, match="other data"):
        begin(config(mine, images=mine / "elsewhere"))
    with pytest.raises(UserError, match="holds a run with files.init"):
        begin(config(mine, images=mine / "elsewhere", init=mine))
