"""Weights of another run: they arrive whole, and nothing that is measured has taught them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files_test import NAMES, config, mine  # noqa: F401 - a fixture

from mira_u_jax import checkpoint, data, files, initial, learned, runs, steps, train
from mira_u_jax import config as configuration
from mira_u_jax.errors import Preempted, UserError


def saved(settings, workdir, images=learned.NOTHING):
    """A workdir with random networks of these settings: theta by its seed, phi another."""
    names = steps.network_names(settings)
    params, averages = (steps.init_params(names, "train", settings, jax.random.key(seed)) for seed in (5, 6))
    state = steps.init_state(params, steps.make_optimizer(settings.optim, names, lambda _: 0.0), settings.optim)
    configuration.save(settings, workdir, {"commit": "abc"}, {"images": 9, "labelled": 2, "digest": "d"})
    learned.keep(workdir, images)
    with checkpoint.open_manager(workdir, "train") as manager:
        checkpoint.save(manager, 1, state.replace(ema=averages))
    return averages


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def from_(folder, **keys):
    return {"files.init": str(folder), **keys}


@pytest.fixture(scope="module")
def sources(tiny_config, tmp_path_factory):
    """{name: (folder, averages)} of a run of MIRA-U and of a supervised one."""
    made = {}
    for name in ("mira_u", "supervised"):
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, saved(tiny_config(f"method={name}"), folder)
    return made


def test_averages_of_the_networks_that_both_have(tiny_config, sources, tmp_path):
    """At another size, dropout and method; from a supervised run the student alone."""
    both, one = ["student", "vit"], ["student"]
    cases = (("mira_u", "mira_u", both), ("supervised", "mira_u", one), ("mira_u", "supervised", one))
    for i, (method, source, names) in enumerate(cases):
        folder, averages = sources[source]
        settings = tiny_config(f"method={method}", size=64, **from_(folder, **{"student.dropout": 0.3}))
        found = initial.take(tmp_path / str(i), settings, steps.network_names(settings))
        assert list(found) == names and all(same(found[name], averages[name]) for name in names)


def test_what_can_be_wrong_with_it_is_said_before_anything_is_written(tiny_config, sources, tmp_path):
    folder, _ = sources["mira_u"]
    for name, key, value in (("student", "student.widths", (8, 8, 16, 16, 24)), ("vit", "vit.depth", 2)):
        with pytest.raises(UserError, match=f"key init=.*: its {name} has other layers"):
            initial.check(tiny_config(**from_(folder, **{key: value})))
    (tmp_path / "file").write_text("x")
    configuration.save(tiny_config(), tmp_path / "begun", {})
    for wrong in ("nobody", "file", "begun"):
        with pytest.raises(UserError, match=f"key init=.*{wrong}: give the folder of a run"):
            train.run(tiny_config(**from_(tmp_path / wrong)), tmp_path / "run")
    older = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "older")
    older["config"]["vit"] |= {"head_channels": 8}
    del older["config"]["vit"]["head_widths"]
    (tmp_path / "older" / "config.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match="key init: .*older is a run with vit.head_channels"):
        initial.check(tiny_config(**from_(tmp_path / "older")))
    settings = tiny_config("method=supervised", **from_(tmp_path / "older"))  # which asks for its student alone
    assert list(initial.take(tmp_path / "taken", settings, ("student",))) == ["student"]
    assert not (tmp_path / "run").exists()


def test_weights_that_have_gone_on_are_not_taken_for_those_of_before(tiny_config, sources, tmp_path):
    settings = tiny_config("method=supervised", **from_(tmp_path / "source"))
    saved(tiny_config("method=supervised"), tmp_path / "source")
    first = initial.take(tmp_path / "run", settings, ("student",))
    assert same(first, initial.take(tmp_path / "run", settings, ("student",)))
    with checkpoint.open_manager(tmp_path / "source", "train") as manager:
        later = jax.tree.map(lambda x: jnp.asarray(x) + 1, first)
        tx = steps.make_optimizer(settings.optim, first, lambda _: 0.0)
        checkpoint.save(manager, 2, steps.init_state(later, tx, settings.optim))
    with pytest.raises(UserError, match="key init=.*others than those that .*run began with"):
        initial.take(tmp_path / "run", settings, ("student",))


def test_what_a_folder_holds_out_has_taught_nothing(mine, tiny_config):  # noqa: F811
    """Whatever run it comes from: one of the same folder, one that began with that, one on ISIC with these as `extra`."""
    held = [name for name in NAMES[:8] if files.held_out(name, 0.4)]
    most, all_of_it = config(mine, holdout=0.4), config(mine, holdout=0)
    target = {"holdout": 0.4, "preset": "smoke"}
    saved(most, mine / "most", data.training_set(most).images)
    known = initial.check(config(mine, init=mine / "most", **target))
    assert set(known.files.values()) == set(NAMES) - set(held)
    saved(all_of_it, mine / "all", data.training_set(all_of_it).images)
    isic = learned.Images(frozenset(["ISIC_0000000"]))
    saved(tiny_config(dataset="isic2016"), mine / "extra", isic | learned.of(mine / "all", all_of_it))
    for source in ("all", "extra"):
        with pytest.raises(UserError, match=f"{len(held)} of the images that this run is measured on, as {held[0]}; take"):
            initial.check(config(mine, init=mine / source, **target))


@pytest.mark.slow
def test_a_run_begins_with_them_and_goes_on_without(mine, tiny_config, monkeypatch):  # noqa: F811
    """The student is the source's, the ViT is pretrained; a run killed in either stage goes on, in the second one without
    the source and without stage 1; what is kept says where the weights are from and all that taught them.
    """
    before = learned.Images(frozenset(["ISIC_0000000"]))
    averages = saved(tiny_config("method=supervised", dataset="isic2016"), mine / "isic", before)
    settings, begun, pretrained = config(mine, init=mine / "isic"), {}, []
    stage, pretrain = train.Run.train, train.Run.pretrain

    def watched(run, names, params):
        begun.update(jax.device_get(params))
        return stage(run, names, params)

    def seen(run, names, *args):
        pretrained.append(names)
        return pretrain(run, names, *args)

    monkeypatch.setattr(train.Run, "train", watched)
    monkeypatch.setattr(train.Run, "pretrain", seen)
    for after, stages in ((2, 1), (4, 2)):  # of 4 and 6 steps
        monkeypatch.setattr(train, "Notice", lambda after=after: Leave(after))
        with pytest.raises(Preempted):
            train.run(settings, mine / "run")
        assert pretrained == [("vit",)] * stages and bool(begun) == (stages == 2)
    fresh = steps.init_params(("vit",), "train", settings, jax.random.key(settings.seed))["vit"]
    assert same(begun["student"], averages["student"])
    assert not same(begun["vit"]["encoder"], fresh["encoder"])
    (mine / "isic").rename(mine / "moved")
    shutil.rmtree(checkpoint.folder(mine / "run", "pretrain"))
    monkeypatch.setattr(train, "Notice", lambda: Leave(99))
    state = train.run(settings, mine / "run")
    assert int(state.step) == settings.train.steps and len(pretrained) == 2
    known = json.loads((mine / "run" / "init.json").read_text())
    assert known["commit"] == "abc" and known["config"]["dataset"] == "isic2016" and str(mine) not in json.dumps(known)
    taught = learned.of(mine / "run", settings)
    assert taught.ids == before.ids and set(taught.files.values()) <= set(NAMES) and len(taught.files) >= 9


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

    def begin(settings, run="run", **data_of):
        sizes = {"images": 12, "labelled": 8} | data_of
        configuration.save(settings, tmp_path / run, {}, sizes)

    def digest(settings):
        return data.training_set(settings).digest

    begin(config(mine), digest=digest(config(mine)))
    begin(config(mine), run="older")
    (mine / "images").rename(mine / "elsewhere")
    moved = config(mine, images=mine / "elsewhere")
    begin(moved, digest=digest(moved))
    assert configuration.load(tmp_path / "run").files.images == str(mine / "elsewhere")
    with pytest.raises(UserError, match="holds a run with files.images"):  # nothing would tell it from another folder
        begin(moved, run="older")
    (mine / "elsewhere" / f"{NAMES[10]}.png").unlink()
    with pytest.raises(UserError, match="other data"):
        begin(moved, digest=digest(moved))
    with pytest.raises(UserError, match="holds a run with files.init"):
        begin(config(mine, images=mine / "elsewhere", init=mine), digest=digest(moved))


def test_a_report_tells_runs_apart_by_what_they_began_with(results):
    titles, few = set(), {"dataset": "isic2016", "frac": 0.1, "method": "mira_u"}
    for i, began in enumerate((few, few | {"frac": 1}, None)):
        path = results("method=supervised,preset=cpu", 0.9, label_seed=i)
        result = json.loads(path.read_text())
        if began:
            result["config"]["files"]["init"] = True
            result["init"] = {"config": began}
        path.write_text(json.dumps(result))
        titles.add(runs.grouped(runs.load([path]))[0].title)
    assert len(titles) == 3 and "supervised init=isic2016_0.1_mira_u" in titles and "supervised" in titles


