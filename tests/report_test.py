"""The report's tables hold the figures of the runs, the paper's beside them, and a mark where a row cannot be."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mira_u_jax import paper, paper_tables, report, runs, text

ROOT = pathlib.Path(__file__).parent.parent


def read(folder, name):
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def written(results, tmp_path):
    """A folder with the report of runs on ISIC's test images, with the preset cpu; three pairs of most."""
    for i in range(3):
        end = f"preset=cpu,label_seed={3 + i},seed={3 + i}"
        results(f"frac=0.1,method=supervised,{end}", 0.85 + 0.01 * i)
        results(f"frac=1,method=supervised,{end}", 0.90 + 0.01 * i)
        results(f"frac=0.1,{end}", 0.88 + 0.01 * i)
        results(f"frac=0.1,ablate=no_mim,{end}", 0.86 + 0.01 * i)
        results(f"frac=0.1,method=udamt,{end}", 0.87 + 0.01 * i)
    results("frac=0.5,preset=cpu,label_seed=3,seed=3", 0.91, also={"ph2": 0.84})
    results("frac=0.5,batch=4,preset=cpu,label_seed=3,seed=3", 0.92)
    results("frac=0.5,ablate=T2,preset=cpu,label_seed=3,seed=3", 0.92)
    report.write(runs.load([results.folder]), tmp_path / "out")
    return tmp_path / "out"


def test_masks(written):
    rows = {(row["labels"], row["method"]): row for row in read(written, "segmentation")}
    row = rows["10%", "mira_u"]
    assert row["data"] == "isic2016, cpu 64 px" and row["pairs"] == "3" and row["Dice"] == ".8900"
    half = 4.302652729911275 * 0.01 / 3**0.5  # Student's t, two degrees of freedom
    assert row["95% t"] == f"[{text.figure(0.89 - half)}, {text.figure(0.89 + half)}]"
    assert row["check"] == "possible" and row["failures"] == ".1000" and row["missed"] == "2.0"
    assert rows["50%", "mira_u"]["95% t"] == "-"


def test_differences_on_another_data_set_stand_beside(results, tmp_path):
    for i in range(2):
        end = f"frac=0.1,preset=cpu,label_seed={3 + i},seed={3 + i}"
        results(f"method=supervised,{end}", 0.85, also={"ph2": 0.80, "mine": 0.7})
        results(end, 0.88, also={"ph2": 0.86})
    results("method=supervised,frac=1,preset=cpu,label_seed=3,seed=3", 0.91, also={"ph2": 0.84})
    report.write(runs.load([results.folder]), tmp_path / "out")
    here, there = read(tmp_path / "out", "differences")
    assert (here["data"], here["Dice"]) == ("isic2016, cpu 64 px", ".0300")
    assert (there["data"], there["Dice"], there["pairs"]) == ("isic2016, cpu 64 px, on ph2", ".0600", "2")
    here, there = read(tmp_path / "out", "gaps")
    assert (here["data"], here["share closed"]) == ("isic2016, cpu 64 px", ".50")
    assert (there["data"], there["share closed"]) == ("isic2016, cpu 64 px, on ph2", "1.50")


def test_a_further_evaluation_that_some_pairs_lack_says_of_how_many_it_is(results, tmp_path):
    for i, also in enumerate(({"ph2": 0.80}, {"ph2": 0.82}, {})):
        results(f"frac=0.1,preset=cpu,label_seed={3 + i},seed={3 + i}", 0.88, also=also)
    report.write(runs.load([results.folder]), tmp_path / "out")
    (row,) = read(tmp_path / "out", "segmentation")
    assert (row["pairs"], row["Dice on ph2"]) == ("3", ".8100 (2)")


def test_a_run_that_is_measured_on_ph2_stands_in_its_table_alone(results, tmp_path):
    results("frac=0.5,preset=cpu,label_seed=3,seed=3", 0.91, test="ph2")
    report.write(runs.load([results.folder]), tmp_path / "out")
    assert {p.name[:6] for p in (tmp_path / "out").glob("table*.csv")} == {"table3"}
    assert ".9100" in next((tmp_path / "out").glob("table3*.csv")).read_text()


def test_the_parameters_of_a_run_with_older_keys_are_counted(results):
    settings = json.loads(results("frac=0.5,preset=smoke,label_seed=3,seed=3", 0.9).read_text())["config"]
    wanted = paper_tables.parameters(settings)
    settings["student"]["heads"] = settings["student"].pop("outputs")
    del settings["mesh"], settings["evaluation"]
    assert paper_tables.parameters(settings) == wanted and int(wanted.replace(",", "")) > 1_000
    assert "heads" in settings["student"]
    settings["vit"]["head_channels"] = settings["vit"].pop("head_widths")[0]  # a head that is no longer here
    assert paper_tables.parameters(settings) == "-"


def test_differences_and_gaps(written):
    rows = {(row["method"], row["against"]): row for row in read(written, "differences") if row["labels"] == "10%"}
    row = rows["mira_u", "supervised"]
    assert row["Dice"] == ".0300" and row["verdict"] == "open, 3 of 5 pairs"
    assert rows["mira_u no_mim", "mira_u"]["Dice"] == "-.0200"
    assert ("supervised", "mira_u") not in rows and ("mira_u", "mira_u") not in rows
    (row,) = [row for row in read(written, "gaps") if row["method"] == "mira_u"]
    assert row["method - supervised"] == ".0300" and row["supervised with all - supervised"] == ".0500"
    assert row["share closed"] == ".60" and row["pairs"] == "3"


def test_methods_with_another_student_are_held_against_each_other(results, tmp_path):
    """Not against the plain ones, which have another level; the plain ones' rows stay what they are."""
    small = {"student.dropout": 0.3}
    for i in range(2):
        end = f"preset=cpu,label_seed={3 + i},seed={3 + i}"
        for at, changed in ((0.0, {}), (0.05, small)):
            results(f"frac=0.1,method=supervised,{end}", 0.80 + at, **changed)
            results(f"frac=1,method=supervised,{end}", 0.90 + at, **changed)
            results(f"frac=0.1,{end}", 0.82 + at * 1.2, **changed)
            results(f"frac=0.1,teacher=ema,{end}", 0.83 + at * 1.4, **changed)
    report.write(runs.load([results.folder]), tmp_path / "out")
    rows = {(r["labels"], r["method"], r["against"]): r["Dice"] for r in read(tmp_path / "out", "differences")}
    other = "student.dropout=0.3"
    assert {key[1:]: value for key, value in rows.items() if key[0] == "10%"} == {
        ("mira_u", "supervised"): ".0200", ("mira_u teacher=ema", "supervised"): ".0300",
        ("mira_u teacher=ema", "mira_u"): ".0100", (f"mira_u {other}", f"supervised {other}"): ".0300",
        (f"mira_u {other} teacher=ema", f"supervised {other}"): ".0500",
        (f"mira_u {other} teacher=ema", f"mira_u {other}"): ".0200",
        (f"supervised {other}", "supervised"): ".0500", (f"mira_u {other}", "mira_u"): ".0600",
    }
    shares = {row["method"]: row["share closed"] for row in read(tmp_path / "out", "gaps")}
    assert shares == {
        "mira_u": ".20", "mira_u teacher=ema": ".30", f"mira_u {other}": ".30", f"mira_u {other} teacher=ema": ".50",
    }


def test_the_papers_tables(written):
    end = "isic2016_cpu_64_px"
    table2 = {row["row"]: row for row in map(dict, csv_rows(written, f"table2_{end}"))}
    assert list(table2) == [row.label for row in paper.ROWS if row.table == 2]
    first = table2["10%, batch 4"]
    assert first["Dice published"] == "0.47975" and first["check"].startswith("**no**: IoU above R")
    assert first["run again as"] == "mira_u, 10%, batch 8" and first["Dice"] == ".8900"  # the preset's batch stands in
    assert table2["50%, batch 4"]["run again as"] == "mira_u batch=4, 50%, batch 4"
    assert table2["50%, batch 8"]["Dice"] == ".9100" and table2["20%, batch 4"]["Dice"] == "-"
    table3 = {row["row"]: row for row in csv_rows(written, f"table3_{end}")}
    assert table3["batch 8"]["Dice"] == ".8400" and table3["batch 4"]["Dice"] == ".8400"  # PH2, not ISIC's .91
    table4 = {row["row"]: row for row in csv_rows(written, f"table4_{end}")}
    assert table4["UDAMT [38], 10% (cited)"]["Dice"] == ".8800" and table4["FixMatch [38], 50% (cited)"]["Dice"] == "-"
    assert sum("(cited)" in row for row in table4) == 9 and table4["MIRA-U, 50%"]["Dice"] == ".9100"
    table5 = {row["row"]: row for row in csv_rows(written, f"table5_{end}")}
    assert table5["full"]["run again as"] == "mira_u, 50%, batch 8"
    assert table5["no MIM"]["run again as"] == "mira_u no_mim, 10%, batch 8"
    (row,) = csv_rows(written, f"table1_{end}")
    assert row["teacher"] == "T2" and row["parameters published"] == "28,943" and row["passes again"] == "12"
    assert int(row["ViT parameters"].replace(",", "")) > 300_000


def csv_rows(folder, name):
    """Rows as dicts; a header that comes twice gets " again" for its second column."""
    with (folder / f"{name}.csv").open() as file:
        header, *rows = csv.reader(file)
    names = [name if header.index(name) == i else f"{name} again" for i, name in enumerate(header)]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_our_own_impossible_rows_are_marked(results, tmp_path):
    path = results("frac=0.1,label_seed=3,seed=3", 0.9)
    result = json.loads(path.read_text())
    result["evaluation"]["iou"] = 0.79
    path.write_text(json.dumps(result))
    report.write(runs.load([results.folder]), tmp_path / "out")
    (row,) = read(tmp_path / "out", "segmentation")
    assert row["check"] == "**no**: IoU too low, by .0282; IoU below P + R - 1, by .0100"
    assert read(tmp_path / "out", "runs")[0]["check"] == row["check"]


def test_long_titles_make_file_names_that_a_disk_takes_and_that_differ():
    long = "mira_u " + " ".join(f"augment.strong_magnitude={i}" for i in range(40))
    names = [text.slug(t) for t in (long, long + "0", "a: b")]
    assert len(set(names)) == 3 and max(map(len, names)) == 80 and names[2] == "a_b" and names[0][:60] == names[1][:60]


def test_dev_runs_are_not_set_beside_the_paper(results, tmp_path):
    results("frac=0.1,split=dev,label_seed=3,seed=3", 0.9)
    report.write(runs.load([results.folder]), tmp_path / "out")
    assert not list((tmp_path / "out").glob("table*"))
    assert read(tmp_path / "out", "segmentation")[0]["data"] == "isic2016 dev, full 256 px"


def test_markdown_holds_the_tables_and_the_pictures(written):
    page = (written / "report.md").read_text()
    for name in ("Masks", "Differences over common pairs", "Share of the gap closed", "Table 5: ablations", "Runs"):
        assert f"## {name}" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.count("|") - line.count("\\|") == line.replace("\\|", "").count("|")
    for picture in written.glob("*.png"):
        assert f"]({picture.name})" in page and picture.stat().st_size > 5_000
    assert {p.name.partition("_")[0] for p in written.glob("*.png")} == {"labels", "reliability", "doubt"}


def test_pictures_of_a_run_come_along(results, tmp_path):
    path = results("frac=0.1,label_seed=3,seed=3", 0.9)
    workdir = tmp_path / "runs" / "x"
    (workdir / "figures").mkdir(parents=True)
    (workdir / "config.json").write_text(path.read_text())
    path.rename(workdir / "result.json")
    for width, name in enumerate(("isic2016_test_student", "ph2_test_student", "train_000100", "train_000200"), 8):
        Image.new("RGB", (width, 8)).save(workdir / "figures" / f"{name}.png")
    lines = [{"step": s, "split": "train", "loss_sup": 1 / s, "student_dice": 0.1 * s} for s in (1, 2, 3)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report.write(runs.load([tmp_path / "runs"]), tmp_path / "out")
    assert "curves_isic2016_full_256_px.png" in found
    copied = {path.name: Image.open(path).size[0] for path in (tmp_path / "out").glob("cases_*.png")}
    assert copied == {
        f"cases_isic2016_full_256_px_mira_u_0.1_{what}.png": width
        for what, width in (("isic2016_test_student", 8), ("ph2_test_student", 9), ("training", 11))
    }
    assert "MIRA-U runs" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("value", "as_text"),
    [
        (0.12346, ".1235"), (-0.5, "-.5000"), (1.0, "1.00"), (12.346, "12.35"), (None, "-"), (0.0, ".0000"), (0, "0"),
        (3, "3"),
    ],
)
def test_figures(value, as_text):
    assert text.figure(value) == as_text


def test_every_row_of_the_paper_has_its_candidates():
    for row in paper.ROWS:
        found = paper_tables.candidates(row)
        assert bool(found) == (row.table != 4 or row.label in paper_tables.TABLE_4), row
    ours = [row.label for row in paper.ROWS if row.table == 4 and not row.cited]
    assert ours == ["MIRA-U, 50%"]


def command(*args):
    """A process of its own: flags are those of the main module."""
    run = [sys.executable, "-m", "mira_u_jax.report", *map(str, args)]
    return subprocess.run(run, cwd=ROOT, env=os.environ, capture_output=True, text=True)


@pytest.mark.parametrize("flag", ["--check-paper", "--check_paper"])
def test_the_check_of_the_paper(flag):
    done = command(flag)
    assert done.returncode == 0, done.stderr
    assert "| Table 2, 50%, batch 4 | .9153 | .9127 | .8552 | .8438 | Dice too high, by .0026 |" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("| Table ")]) == len(paper.ROWS)


def test_several_folders_follow_the_flag(results, tmp_path):
    path = results("frac=0.1,label_seed=3,seed=3", 0.9)
    (tmp_path / "more").mkdir()
    results("frac=0.1,label_seed=4,seed=4", 0.9).rename(tmp_path / "more" / "b.json")
    done = command(f"--runs={path}", tmp_path / "more", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 runs in ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--runs is required, or --check-paper (see --help)"),
        (("--nocheck-paper", "--runs=results"), "--output is required, or --check-paper (see --help)"),
        (("--runs=nowhere", "--output=out"), "--runs: nowhere does not exist; give folders of runs, or results/"),
        (("results", "--output=out"), "argument 'results' is not a flag (see --help)"),
    ],
)
def test_the_command_says_what_it_needs(args, said):
    done = command(*args)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [f"error: {said}"]


def test_results_that_are_committed_can_be_read():
    groups = runs.grouped(runs.load([ROOT / "results"]))
    assert len(groups) > 3 and np.isfinite([g.mean("dice") for g in groups]).all()
