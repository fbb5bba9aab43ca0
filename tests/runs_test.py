"""Finished runs found again, grouped by what they were, and compared pair by pair."""

import json

import numpy as np
import pytest
from scipy import stats

from mira_u_jax import report, runs
from mira_u_jax.errors import UserError


def pairs(results, arg, values, **changed):
    """One result a value, pairs (3, 3), (4, 4), ...; `changed`: dotted keys."""
    for i, value in enumerate(values):
        results(f"{arg},label_seed={3 + i},seed={3 + i}", value, **changed)


def titles(groups):
    return [(g.title, g.config["frac"], [r.pair for r in g.runs]) for g in groups]


def test_runs_of_one_configuration_are_a_group(results):
    pairs(results, "method=supervised,frac=0.1", [0.8, 0.81])
    pairs(results, "frac=0.1", [0.9, 0.91, 0.92])
    pairs(results, "frac=0.25", [0.93])
    pairs(results, "frac=0.1,ablate=no_mim", [0.9])
    pairs(results, "frac=0.1,teacher=vit", [0.85])
    pairs(results, "frac=0.1,batch=4", [0.84])
    pairs(results, "frac=0.1", [0.83], **{"loss.gamma": 0.5})
    three = [(3, 3), (4, 4), (5, 5)]
    assert titles(runs.grouped(runs.load([results.folder]))) == [
        ("mira_u", 0.1, three), ("mira_u batch=4", 0.1, three[:1]), ("mira_u loss.gamma=0.5", 0.1, three[:1]),
        ("mira_u no_mim", 0.1, three[:1]), ("mira_u teacher=vit", 0.1, three[:1]), ("supervised", 0.1, three[:2]),
        ("mira_u", 0.25, three[:1]),
    ]


def test_a_key_from_later_and_one_that_nothing_reads_part_no_group(results):
    pairs(results, "method=supervised,frac=0.1", [0.8])
    results("method=supervised,frac=0.1,label_seed=4,seed=4", 0.8, **{"teacher.source": "both", "loss.gamma": 1.0})
    old = results("method=supervised,frac=0.1,label_seed=5,seed=5", 0.8)
    result = json.loads(old.read_text())
    del result["config"]["evaluation"], result["config"]["loss"]["feature"]
    result["config"]["student"]["heads"] = result["config"]["student"].pop("outputs")  # its name of then
    result["config"]["train"]["keep"] = 1
    old.write_text(json.dumps(result))
    assert titles(runs.grouped(runs.load([results.folder]))) == [("supervised", 0.1, [(3, 3), (4, 4), (5, 5)])]


def test_folders_are_named_where_they_add_to_a_data_set(results):
    """A result says of them only that they were given; of a run on a folder the heading says that."""
    pairs(results, "frac=0.1", [0.8])
    for changed in ({"images": True, "masks": True}, {"extra": True}):
        path = results("frac=0.1,label_seed=4,seed=4", 0.8)
        result = json.loads(path.read_text())
        result["config"]["files"] |= {"images": False, "masks": False, "extra": False} | changed
        result["config"]["dataset"] = "folder" if "images" in changed else "isic2016"
        (path.parent / f"{min(changed)}.json").write_text(json.dumps(result))
        path.unlink()
    assert sorted(title for title, *_ in titles(runs.grouped(runs.load([results.folder])))) == [
        "mira_u", "mira_u", "mira_u extra=True",
    ]


def test_runs_measured_on_more_images_are_another_group(results):
    """The complete test set beside a part of it: no mean is over both, none is held against the other, nor fills its gap."""
    for i in range(2):
        end = f"method=supervised,preset=cpu,label_seed={3 + i},seed={3 + i}"
        few, every = results(f"frac=0.1,{end}", 0.85), results(f"frac=1,{end}", 0.9)
        results(f"frac=0.1,preset=cpu,label_seed={3 + i},seed={3 + i}", 0.88)
    for path in (few, every):
        found = json.loads(path.read_text())
        found["evaluation"]["images"] += 1
        path.write_text(json.dumps(found))
    groups = runs.grouped(runs.load([results.folder]))
    assert [(method, frac, len(pairs)) for method, frac, pairs in titles(groups)] == [
        ("mira_u", 0.1, 2), ("supervised", 0.1, 1), ("supervised", 1, 1), ("supervised", 0.1, 1), ("supervised", 1, 1)
    ]
    (row,) = report.gaps(groups)[3]
    assert row[2:4] == ["mira_u", "1"]


def test_a_key_that_is_gone_parts_a_group_where_it_was_set(results):
    kept = results("frac=0.1,label_seed=3,seed=3", 0.9)
    result = json.loads(kept.read_text())
    for value in (False, True):
        result["config"]["teacher"]["upside_down"] = value
        (results.folder / f"{value}.json").write_text(json.dumps(result))
    found = [title for title, *_ in titles(runs.grouped(runs.load([results.folder])))]
    assert found == ["mira_u", "mira_u teacher.upside_down=True"]


def test_a_run_found_twice_counts_once_and_what_is_no_run_is_left_out(results, tmp_path):
    kept = results("frac=0.1,label_seed=3,seed=3", 0.9)
    workdir = tmp_path / "runs" / "x"
    workdir.mkdir(parents=True)
    result = json.loads(kept.read_text())
    result["config"]["data_dir"] = "elsewhere"
    (workdir / "result.json").write_text(json.dumps(result))
    (workdir / "config.json").write_text(json.dumps({"config": result["config"]}))
    (results.folder / "notes.json").write_text("[1]")
    (results.folder / "cut.json").write_text('{"config": {')
    (found,) = runs.load([results.folder, tmp_path / "runs", kept])
    assert found.folder == workdir  # the one with pictures
    assert runs.load([kept])[0].folder is None
    with pytest.raises(UserError, match="nowhere does not exist"):
        runs.load([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished run in .*empty"):
        runs.load([tmp_path / "empty"])


def test_intervals_are_students():
    values = np.random.default_rng(0).normal(0.01, 0.02, 6)
    found = runs.interval(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.count) == pytest.approx((values.mean(), wanted.low, wanted.high, 6))
    assert runs.interval([0.5]) == runs.Interval(0.5, None, None, 1)


def test_differences_are_paired(results):
    """A pair's own level, large beside the gain, must not blur it; pairs that one group lacks are left out."""
    level, gain = np.array([0.7, 0.9, 0.8, 0.85, 0.75]), np.array([0.01, 0.012, 0.008, 0.011, 0.009])
    pairs(results, "method=supervised,frac=0.1", level)
    pairs(results, "frac=0.1", level + gain)
    results("frac=0.1,label_seed=2,seed=2", 0.1)
    ours, plain = runs.grouped(runs.load([results.folder]))
    found = runs.difference(ours, plain)
    wanted = stats.ttest_rel(level + gain, level).confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.count) == pytest.approx((gain.mean(), wanted.low, wanted.high, 5))
    assert runs.word(found) == "better" and runs.word(runs.difference(plain, ours)) == "worse"
    assert runs.difference(ours, plain, "nothing") is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.01] * 4, "open, 4 of 5 pairs"), ([0.01, -0.02, 0.03, 0.0, 0.01], "no difference shown"),
        ([0.1], "open, 1 of 5 pairs"),
    ],
)
def test_words_wait_for_five_pairs(values, said):
    assert runs.word(runs.interval(values)) == said


def test_gap_is_a_ratio_of_means_over_common_pairs(results):
    pairs(results, "method=supervised,frac=0.1", [0.80, 0.82, 0.50])
    pairs(results, "method=supervised,frac=1", [0.90, 0.90])
    pairs(results, "frac=0.1", [0.86, 0.88, 0.90])
    ours, few, every = runs.grouped(runs.load([results.folder]))
    found = runs.gap(ours, few, every)
    assert (found.ours, found.all, found.count, found.share) == pytest.approx((0.06, 0.09, 2, 2 / 3))
    assert runs.gap(few, few, few).share is None
    assert runs.plain([ours, few, every], "supervised") in (few, every) and runs.plain([few, every], "mira_u") is None


def test_plain_is_the_group_with_nothing_changed(results):
    pairs(results, "frac=0.1,teacher=vit", [0.85])
    pairs(results, "frac=0.1,batch=4", [0.84])
    pairs(results, "frac=0.1,ablate=no_mim", [0.84])
    groups = runs.grouped(runs.load([results.folder]))
    assert runs.plain(groups, "mira_u") is None  # all are variants
    assert runs.plain(groups, "mira_u", batch=4).title == "mira_u batch=4"
    assert runs.plain(groups, "mira_u", "no_mim").title == "mira_u no_mim"
    pairs(results, "frac=0.1", [0.83], **{"loss.gamma": 0.5})
    pairs(results, "frac=0.1", [0.83], **{"loss.gamma": 0.5, "loss.ramp": 0.7})
    groups = runs.grouped(runs.load([results.folder]))
    assert runs.plain(groups, "mira_u").title == "mira_u loss.gamma=0.5"  # defaults may have moved since: the nearest


def test_supervised_with_masked_image_modelling_is_another_method(results):
    pairs(results, "method=supervised,frac=0.1", [0.85])
    pairs(results, "method=supervised,frac=0.1", [0.86], **{"mim.steps": 400})
    titles = {g.title for g in runs.grouped(runs.load([results.folder]))}
    assert titles == {"supervised", "supervised mim.steps=400"}


def test_what_grid_measured_elsewhere_stays_with_a_run_that_is_found_twice(results, tmp_path):
    kept = results("frac=0.1,label_seed=3,seed=3", 0.9, also={"ph2": 0.8})
    workdir = tmp_path / "runs" / "x"
    workdir.mkdir(parents=True)
    own = json.loads(kept.read_text())
    del own["also"]
    (workdir / "result.json").write_text(json.dumps(own))
    (run,) = runs.load([tmp_path / "runs", results.folder])
    assert run.folder == workdir and run.also["ph2"]["dice"] == 0.8


def test_image_bootstraps(results):
    rng = np.random.default_rng(1)
    easy = rng.uniform(0.5, 1, 80)
    for i in range(2):
        for arg, gain in (("frac=0.1", 0.02), ("method=supervised,frac=0.1", 0.0)):
            each = easy + gain + rng.normal(0, 0.01, 80)
            images = {str(j): value for j, value in enumerate(each)}
            results(f"{arg},label_seed={3 + i},seed={3 + i}", each.mean(), images=images)
    ours, plain = runs.grouped(runs.load([results.folder]))
    low, high = ours.image_interval()
    each = np.mean([list(run.dice.values()) for run in ours.runs], 0)
    assert low < each.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * each.std(ddof=1) / 80**0.5, rel=0.15)
    low, high = runs.image_difference(ours, plain)
    assert 0.012 < low < 0.02 < high < 0.028  # paired by image: the spread of easy and hard images is gone
    for run in ours.runs:
        run.path.with_suffix(".csv").unlink()
    ours, plain = runs.grouped(runs.load([results.folder]))
    assert runs.image_difference(ours, plain) is None
    assert ours.image_interval() == pytest.approx(np.mean([r.evaluation["ci95"]["dice"] for r in ours.runs], 0))


def test_figures_on_another_set_stand_apart(results):
    results("frac=0.5,label_seed=3,seed=3", 0.9, also={"ph2": 0.8})
    results("frac=0.5,label_seed=4,seed=4", 0.9)
    (group,) = runs.grouped(runs.load([results.folder]))
    assert group.values("dice", "ph2") == {(3, 3): 0.8} and group.mean("dice") == pytest.approx(0.9)
    assert group.values("dice", "elsewhere") == {} and group.mean("dice", "elsewhere") is None
