"""Cells of a table: names, who takes which, what is run once, what is kept. No training; cli_test.py has one."""

import json
import pathlib
import re
import subprocess
import sys
import time

import pytest

from configs import common, tables
from mira_u_jax import config, grid
from mira_u_jax.errors import UserError


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(table, ...): a grid of two small tables that share a cell."""
    first, second = "frac=0.1,method=mira_u,label_seed=3,seed=3", "frac=1,label_seed=4,seed=4"
    first, second = f"configs/isic.py:{first}", f"configs/isic.py:{second}"
    monkeypatch.setattr(tables, "TABLES", {"one": [first, second], "two": [second]})

    def make(table="one", **changes):
        options = {"preset": "smoke", "split": "test", "runs": tmp_path / "runs", "results": tmp_path / "results"}
        return grid.Grid(table, **options | changes)

    return make


@pytest.fixture
def started(tmp_path, monkeypatch):
    """What was started, as (module, arguments); it leaves behind what a finished run does, or returns `status`."""
    calls, status = [], {"main": 0, "evaluate": 0}

    def start(module, *args, lock):
        calls.append((module, args))
        given = dict(arg.removeprefix("--").split("=", 1) for arg in args if "=" in arg)
        if module == "main" and status[module] == 0:
            workdir = tmp_path / "runs" / given["workdir"].split("/")[-1]
            workdir.mkdir(parents=True)
            (workdir / "result.json").write_text(json.dumps({"config": {"frac": 1}, "evaluation": {"dice": 0.9}}))
            (workdir / "evaluation_images.csv").write_text("id,dice\na,0.9\n")
        if module == "evaluate":
            pathlib.Path(given["json"]).write_text('{"dice": 0.8}')
        return status[module]

    monkeypatch.setattr(grid, "start", start)
    return calls, status


@pytest.mark.parametrize("table", tables.TABLES)
def test_every_cell_is_a_configuration_with_a_name_of_its_own(table):
    cells = grid.Grid(table, preset="cpu", split="test", runs="runs", results="results").cells
    assert len(cells) == len(tables.TABLES[table])
    assert len({*cells.values()}) == len(cells)
    for cell in cells.values():
        file, _, arg = cell.partition(":")
        assert file == "configs/isic.py"
        resolved = config.check(common.get_config(f"{arg},preset=cpu"))
        assert (resolved.label_seed, resolved.seed) in tables.PAIRS


def test_tables_are_those_asked_for():
    a = [grid.cell_name(cell, "cpu", "test") for cell in tables.TABLES["a"]]
    assert len(a) == 2 * 4 * 5 and len(tables.PAIRS) == 5
    assert a[:2] == ["isic_cpu_frac0.1_mira_u_l3_s3", "isic_cpu_frac0.1_supervised_l3_s3"]
    b = " ".join(tables.TABLES["b"])
    for name in (*common.METHODS, *(n for n in common.ABLATIONS if n not in ("T1", "T2", "T3", "T4")), "=vit", "=ema"):
        assert b.count(name) >= 3, name
    assert not {labels for labels, _ in tables.PAIRS} & {0, 1, 2}  # those served the choices


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("frac=0.1,ablate=no_mim,label_seed=3,seed=4", "isic_cpu_dev_frac0.1_mira_u_no_mim_l3_s4"),
        ("frac=0.1,teacher=vit,label_seed=3,seed=4", "isic_cpu_dev_frac0.1_mira_u_teacher-vit_l3_s4"),
        ("frac=0.5,batch=4,label_seed=3,seed=4", "isic_cpu_dev_frac0.5_batch4_mira_u_l3_s4"),
        ("frac=0.5,batch=8,label_seed=3,seed=4", "isic_cpu_dev_frac0.5_mira_u_l3_s4"),  # what the preset has anyway
        ("frac=0.5,method=udamt,label_seed=3,seed=4", "isic_cpu_dev_frac0.5_udamt_l3_s4"),
    ],
)
def test_names(cell, name):
    assert grid.cell_name(f"configs/isic.py:{cell}", "cpu", "dev") == name


def test_a_cell_is_trained_measured_kept_and_not_run_again(make, started, tmp_path):
    one, (calls, _) = make(), started
    name = list(one.cells)[1]
    assert one.state(name) == "open"
    assert one.run(name, data_dir="there", also=["ph2"]) == 0
    workdir = tmp_path / "runs" / name
    found = workdir / "evaluation_ph2.json"
    assert calls == [
        ("main", ("--config=configs/isic.py:frac=1,label_seed=4,seed=4,preset=smoke,split=test", f"--workdir={workdir}",
                  "--config.data_dir=there")),
        ("evaluate", (f"--workdir={workdir}", "--dataset=ph2", f"--json={found}", "--data_dir=there")),
    ]
    kept = json.loads((tmp_path / "results" / "one" / f"{name}.json").read_text())
    assert kept == {"config": {"frac": 1}, "evaluation": {"dice": 0.9}, "also": {"ph2": {"dice": 0.8}}}
    assert (tmp_path / "results" / "one" / f"{name}.csv").read_text() == "id,dice\na,0.9\n"
    assert one.state(name) == "done"
    assert one.run(name) is None and make("two").run(name) is None  # nor for another table
    assert len(calls) == 2
    other = make(preset="cpu")
    assert [other.state(n) for n in other.cells] == ["open", "open"]  # another preset is another run


def test_a_finished_cell_is_measured_on_what_it_lacks(make, started, tmp_path):
    """Without training again; its result stays where it is, whichever table asks."""
    one, two, (calls, _) = make(), make("two"), started
    (name,) = two.cells
    assert one.run(name) == 0 and not one.lacks(name, [])
    assert two.lacks(name, ["ph2"]) == ["ph2"] and two.run(name, also=["ph2"]) == 0
    assert [module for module, _ in calls] == ["main", "evaluate"]
    assert json.loads((tmp_path / "results" / "one" / f"{name}.json").read_text())["also"] == {"ph2": {"dice": 0.8}}
    assert not (tmp_path / "results" / "two").exists() and not two.lacks(name, ["ph2"])
    (tmp_path / "runs" / name / "result.json").unlink()
    assert not one.lacks(name, ["other"])  # nothing is left to be measured


def test_another_run_of_a_finished_cell_does_not_take_its_place(make, started, tmp_path):
    """As one trained again into other results leaves in the same folder of runs."""
    one, (calls, _) = make(), started
    name = list(one.cells)[0]
    assert one.run(name) == 0 and one.lacks(name, ["ph2"]) == ["ph2"]
    kept = tmp_path / "results" / "one" / f"{name}.json"
    before, here = kept.read_text(), tmp_path / "runs" / name / "result.json"
    here.write_text(json.dumps(json.loads(here.read_text()) | {"evaluation": {"dice": 0.1}}))
    assert one.lacks(name, ["ph2"]) == [] and one.run(name, also=["ph2"]) is None
    assert len(calls) == 1 and kept.read_text() == before


def test_further_masks_are_named_like_a_data_set(make, started, tmp_path):
    """ph2 is there already, so only the other evaluation is made, and both are kept."""
    one, (calls, _) = make(), started
    name, masks = list(one.cells)[0], "isic2016+all+flips+largest"
    assert one.run(name, also=["ph2"]) == 0 and one.run(name, also=["ph2", masks]) == 0
    workdir = tmp_path / "runs" / name
    found = f"--json={workdir / f'evaluation_{masks}.json'}"
    words = (f"--workdir={workdir}", "--dataset=isic2016", found, "--network=all", "--flips", "--largest")
    assert calls[2:] == [("evaluate", words)]
    assert set(json.loads((tmp_path / "results" / "one" / f"{name}.json").read_text())["also"]) == {"ph2", masks}
    assert one.run(name, also=[masks, "ph2"]) is None


@pytest.mark.parametrize("also", ["", "isic2016+flip", "+flips", "ph2+largest+"])
def test_a_wrong_further_evaluation_is_refused_at_once(also):
    with pytest.raises(UserError, match=re.escape(f"--also={also}: write DATASET")):
        grid.check_also(["ph2", also])


def test_a_further_evaluation_on_nothing_is_refused_at_once(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    with pytest.raises(UserError, match="--also=PH2.flips: PH2 is neither one of isic2016.* nor a folder"):
        grid.check_also(["ph2+flips", f"{tmp_path}+all", "PH2+flips"])


@pytest.mark.parametrize("broken", ["main", "evaluate"])
def test_a_cell_that_breaks_is_not_done(make, started, broken):
    one, (_, status) = make(), started
    status[broken] = 1
    name = list(one.cells)[0]
    assert one.run(name, also=["ph2"]) == 1
    assert one.state(name) in ("open", "begun") and not one.finished(name)


def test_a_cell_that_another_has_is_left_alone(make, started):
    one, name = make(), list(make().cells)[0]
    with one.lock(name):
        assert one.state(name) == "running" and one.run(name) is None and not started[0]
        assert one.run(list(one.cells)[1]) == 0  # but not the next one
    assert one.state(name) == "open" and one.run(name) == 0


def test_a_lock_outlives_the_command_as_long_as_its_training_does(make, tmp_path):
    """Kill -9 of the grid leaves the training alive: nobody may start a second one beside it."""
    one, name = make(), list(make().cells)[0]
    lock = one.lock(name)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fileno()])
    lock.close()  # as the kernel does for the killed
    assert one.lock(name) is None
    child.kill()
    child.wait()
    for _ in range(100):
        if again := one.lock(name):
            break
        time.sleep(0.05)
    again.close()


def test_shards_are_the_whole_table_and_do_not_overlap():
    names = [str(i) for i in range(10)]
    shards = [grid.chosen(names, None, f"{i}/3") for i in range(3)]
    assert sorted(sum(shards, [])) == names and [len(s) for s in shards] == [4, 3, 3]
    assert grid.chosen(names, 7, None) == ["7"] and grid.chosen(names, None, None) == names


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/3", "1/0"])
def test_a_wrong_shard(shard):
    with pytest.raises(UserError, match="I/N"):
        grid.chosen(["a"], None, shard)


def test_a_wrong_index_table_or_preset(make):
    with pytest.raises(UserError, match=r"--index=1: .* 0..0"):
        grid.chosen(["a"], 1, None)
    with pytest.raises(UserError, match="--table=three: it must be one of one, two"):
        make("three")
    with pytest.raises(UserError, match="--preset=huge: it must be one of smoke"):
        make(preset="huge")
