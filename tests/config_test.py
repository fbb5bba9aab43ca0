"""Presets, methods and ablations build; what is wrong is said in one line; a workdir keeps its configuration."""

import copy
import json
import pathlib
import re

import pytest
from absl import flags
from ml_collections import config_flags

from configs import common, isic, ph2, synthetic
from mira_u_jax import config as configuration
from mira_u_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("preset", common.PRESETS)
@pytest.mark.parametrize("method", common.METHODS)
def test_every_preset_and_method_passes_the_check(preset, method):
    config = configuration.check(isic.get_config(f"preset={preset},method={method}"))
    assert (config.preset, config.method) == (preset, method)


@pytest.mark.parametrize("file", [isic, ph2, synthetic])
def test_config_files_pass_the_check_bare(file):
    configuration.check(file.get_config())


def changed(arg):
    """{dotted key: value} in which a configuration of a small preset, M = 4, differs from the bare one."""
    bare, other = (configuration.flat(common.get_config(f"preset=cpu{more}")) for more in ("", f",{arg}"))
    assert bare.keys() == other.keys()
    return {k: v for k, v in other.items() if v != bare[k]}


def test_teacher_key_sets_the_source_only():
    assert changed("teacher=ema") == {"teacher.source": "ema"}


def test_keys_after_the_colon_reach_the_tree():
    config = common.get_config("frac=0.1,label_seed=3,seed=5,size=64,preset=cpu,split=dev,data_dir=x")
    values = {k: config[k] for k in ("frac", "label_seed", "seed", "size", "preset", "split", "data_dir")}
    assert values == {
        "frac": 0.1, "label_seed": 3, "seed": 5, "size": 64, "preset": "cpu", "split": "dev", "data_dir": "x",
    }


@pytest.mark.parametrize(
    ("arg", "named"),
    [
        ("fraction=0.1", "fraction"), ("frac=0", "frac"), ("frac=1.5", "frac"), ("frac=abc", "frac"), ("frac", "frac"),
        ("frac=nan", "frac"), ("size=100", "size"), ("size=64.5", "size"), ("label_seed=8", "label_seed"),
        ("label_seed=-1", "label_seed"), ("seed=-1", "seed"), ("preset=huge", "preset"), ("method=unet", "method"),
        ("ablate=no_unet", "ablate"), ("method=supervised,teacher=vit", "teacher"), ("teacher=swin", "teacher"),
        ("method=fixmatch,ablate=no_mim", "ablate"), ("split=train", "split"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(arg, named):
    with pytest.raises(UserError) as error:
        isic.get_config(arg)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("size", 40), ("train.batch", 3), ("teacher.passes", 0), ("teacher.passes", 1), ("pseudo.kappa", 0),
        ("loss.norm", "mean"), ("loss.beta", -1.0), ("optim.schedule", "step"), ("ema.alpha", 1.0),
        ("student.stages", ("conv",)), ("student.skips", ("gate",) * 5), ("train.steps", "soon"), ("mim.steps", -1),
        ("student.dropout", 1.0), ("teacher.dropout", False), ("dataset", "isic2017"),
        ("train.steps", "5%"), ("train.precision", "float16"), ("train.precision", 16),
        ("teacher.chunk", -1), ("teacher.chunk", 2.0), ("teacher.chunk", True),
    ],
)
def test_check_names_the_wrong_leaf(dotted, value):
    config = isic.get_config("preset=smoke")
    configuration.update(config, {dotted: value})
    with pytest.raises(UserError) as error:
        configuration.check(config)
    assert dotted.split(".")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_update_cannot_invent_a_key():
    with pytest.raises(KeyError):
        configuration.update(common.tree(), {"train.batches": 3})


def test_ph2_folds():
    assert (ph2.get_config().dataset, ph2.get_config().test) == ("isic2016", "ph2")
    assert ph2.get_config("fold=0").dataset == "ph2"
    for config in (ph2.get_config("fold=0,split=dev"), common.get_config("preset=smoke")):
        if config.dataset != "ph2":
            config.fold = 0
        with pytest.raises(UserError, match="split" if config.dataset == "ph2" else "configs/ph2.py"):
            configuration.check(config)


# --- durations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "steps"), [(1500, 1500), ("1500", 1500), ("200 epochs", 11_400), ("1 epoch", 57), ("0.5 epochs", 28),
                         ("5%", 40), ("100%", 800), (0, 0)],
)
def test_steps_of(value, steps):
    assert configuration.steps_of(value, epoch=57, total=800) == steps


@pytest.mark.parametrize("value", ["soon", "", -5, "-5%", "% 5", "epochs", 2.5, None, "nan%"])
def test_a_duration_that_is_none_is_named(value):
    with pytest.raises(UserError, match="train.steps"):
        configuration.steps_of(value, epoch=57, total=800, key="train.steps")


def test_a_share_of_nothing_is_refused():
    """The length of a stage cannot be a share of itself."""
    with pytest.raises(UserError, match="mim.steps") as error:
        configuration.steps_of("5%", epoch=57, key="mim.steps")
    assert "share" not in str(error.value)


@pytest.mark.parametrize(("key", "text", "value"), [
    ("train.steps", "50 epochs", "50 epochs"), ("train.log_every", "5%", "5%"), ("ema.every", "1 epoch", "1 epoch"),
    ("train.save_every", "7", 7), ("mesh.cpu_devices", "1", 1), ("mesh.cpu_devices", "auto", "auto"),
])
def test_a_number_or_a_text_on_the_command_line(key, text, value):
    values, argv = flags.FlagValues(), ["main", f"--config={ROOT}/configs/isic.py:preset=smoke", f"--config.{key}={text}"]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    assert configuration.get(configuration.check(values.config), key) == value


def test_every_leaf_has_a_rule():
    """Or is a duration, which is checked where the stages are known, or a name that configs/common.py checks."""
    durations = {
        "train.steps", "mim.steps", "train.log_every", "train.save_every", "train.figures_every", "optim.plateau.every",
        "ema.every",
    }
    free = {"name", "data_dir", "preset", "method", "ablate"}
    assert set(configuration.flat(common.tree())) == set(configuration.RULES) | durations | free


@pytest.mark.parametrize(("changes", "named"), [
    ({"vit.patch": 0}, "vit.patch"), ({"vit.patch": 8}, "vit.head_widths=(16, 16)"),
    ({"vit.head_widths": (8, 12)}, "vit.head"),
    ({"vit.heads": 3}, "vit.heads"), ({"mim.decoder.heads": 5}, "mim.decoder.heads"),
    ({"student.widths": (12, 16, 16, 16, 16)}, "student.widths"), ({"optim.plateau.holdout": 1}, "optim.plateau.holdout"),
    ({"loss.beta": 0.0, "mim.joint_weight": 0.5}, "mim.joint_weight"),
    ({"loss.beta": 0.0, "mim.target": "vit"}, "mim.target"), ({"train.log_every": 0}, "train.log_every=0"),
    ({"train.figures_every": "0%"}, "train.figures_every=0"), ({"augment.cutout": 0.01}, "augment.cutout"),
    ({"optim.lr": float("inf")}, "optim.lr"),
])
def test_what_cannot_work_is_named_before_anything_is_read(changes, named):
    config = common.get_config("preset=smoke")
    configuration.update(config, changes)
    with pytest.raises(UserError, match=re.escape(named)):
        configuration.check(config)


# --- config.json ------------------------------------------------------------------------------------------------------


def test_save_and_load(tiny_config, tmp_path):
    config = tiny_config()
    configuration.save(config, tmp_path / "run", {"commit": "abc"})
    assert configuration.flat(configuration.load(tmp_path / "run")) == configuration.flat(config)
    configuration.check(configuration.load(tmp_path / "run"))  # lists instead of tuples are as good
    configuration.save(config, tmp_path / "run", {})  # a resume
    moved = tiny_config(data_dir="elsewhere")  # the data: the same run
    configuration.save(moved, tmp_path / "run", {"commit": "abc"})
    assert configuration.load(tmp_path / "run").data_dir == "elsewhere"  # where evaluation looks for them
    assert "resumed" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_a_run_that_goes_on_says_with_which_code(tiny_config, tmp_path):
    for commit in ("first", "second", "second", "first"):
        configuration.save(tiny_config(), tmp_path, {"commit": commit})
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["commit"] == "first" and kept["resumed"] == [{"commit": "second"}]


def test_a_workdir_refuses_another_configuration(tiny_config, tmp_path):
    configuration.save(tiny_config(), tmp_path, {})
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError) as error:
        configuration.save(tiny_config(**{"loss.gamma": 0.5}), tmp_path, {})
    assert "loss.gamma" in str(error.value) and "workdir" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


def test_runs_that_are_older_than_a_key_go_on(tiny_config, tmp_path):
    """With the value that changes nothing, and with no other; the number of passes at a time changes nothing ever."""
    old = json.loads(tiny_config().to_json())
    del old["train"]["precision"], old["teacher"]["chunk"]
    (tmp_path / "config.json").write_text(json.dumps({"config": old}))
    configuration.save(tiny_config(**{"teacher.chunk": 2}), tmp_path, {})
    assert configuration.fingerprint(configuration.load(tmp_path)) == configuration.fingerprint(tiny_config())
    with pytest.raises(UserError, match="train.precision"):
        configuration.save(tiny_config(**{"train.precision": "bfloat16"}), tmp_path, {})


@pytest.mark.parametrize("text", [None, "not json", "{}", '{"config": {"train": 1}}', "[]"])
def test_load_names_the_file_that_is_missing_or_broken(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        configuration.load(tmp_path)


def test_fingerprint_ignores_only_where_things_lie_and_how_many_are_kept():
    config = common.get_config("preset=smoke")
    before = configuration.fingerprint(config)
    assert before == configuration.fingerprint(common.get_config("preset=smoke"))
    for dotted, value in configuration.flat(config).items():
        other = copy.deepcopy(config)
        new = (not value) if isinstance(value, bool) else value + {str: "x", list: [1]}.get(type(value), 1)
        configuration.update(other, {dotted: new})
        idle = dotted in ("files.holdout", "files.skip")  # nothing to hold out from, or to skip, without a folder
        transport = dotted.split(".")[0] in ("data_dir", "data", "mesh") or dotted == "teacher.chunk"
        transport |= dotted in [f"train.{name}" for name in ("keep", "log_every", "save_every", "figures_every")]
        assert (configuration.fingerprint(other) == before) == (transport or idle), dotted


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path):
    settings, facts = configuration.check(common.get_config("preset=smoke")), {"commit": "a"}
    began = {"images": 10, "labelled": 2, "digest": "one"}
    configuration.save(settings, tmp_path, facts, began)
    configuration.save(settings, tmp_path, facts, dict(began))
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"other data \(10 images, 2 labelled; now 11 images, 3 labelled\): use another"):
        configuration.save(settings, tmp_path, facts, {"images": 11, "labelled": 3, "digest": "two"})
    with pytest.raises(UserError, match=r"\(10 images, 2 labelled, but of other names or contents\): use another"):
        configuration.save(settings, tmp_path, facts, began | {"digest": "two"})
    assert (tmp_path / "config.json").read_text() == before and json.loads(before)["data"] == began
    configuration.save(settings, tmp_path / "old", facts)  # of before the digests
    configuration.save(settings, tmp_path / "old", facts, began)
    assert json.loads((tmp_path / "old" / "config.json").read_text())["data"] == began
