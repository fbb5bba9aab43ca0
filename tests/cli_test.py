"""What a user can get wrong: one line on stderr that names it and the remedy, exit status 2, nothing lost."""

import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
TRAIN = ["ISIC_0000000", "ISIC_0000001", "ISIC_0000002", "ISIC_0000004"]
TEST = ["ISIC_0000003", "ISIC_0000012"]


def main(*args, module="mira_u_jax.main", **environment):
    """(exit status, stdout, stderr) of a command in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def refused(result, *words):
    status, _, err = result
    assert status == 2, err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for word in words:
        assert word in lines[0], lines[0]


def encoded(pixels, format):
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format=format)
    return buffer.getvalue()


def zips(data_dir, *, leave_out=None, **replaced):
    """The four official zips with a few drawn images, in data_dir's manual folder; `replaced`: id -> (image, mask) bytes."""
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, ids in (("Training", TRAIN), ("Test", TEST)):
        image_zip, mask_zip = (f"ISBI2016_ISIC_Part1_{part}_{kind}" for kind in ("Data", "GroundTruth"))
        with zipfile.ZipFile(folder / f"{image_zip}.zip", "w") as a, zipfile.ZipFile(folder / f"{mask_zip}.zip", "w") as b:
            for i in ids:
                skin = rng.integers(120, 220, (60, 80, 3))
                mask = np.zeros((60, 80))
                mask[20:45, 25:60] = 255
                image, truth = encoded(np.where(mask[..., None] > 0, skin // 3, skin), "JPEG"), encoded(mask, "PNG")
                image, truth = replaced.get(i, (None, None))[0] or image, replaced.get(i, (None, None))[1] or truth
                a.writestr(f"{image_zip}/{i}.jpg", image)
                b.writestr(f"{mask_zip}/{i}_Segmentation.png", truth)
    if leave_out:
        (folder / f"{leave_out}.zip").unlink()
    return data_dir


def train(tmp_path, arg="frac=1,preset=smoke", *more):
    return main(f"--config=configs/isic.py:{arg}", f"--config.data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}", *more)


@pytest.mark.parametrize(
    "arg, words",
    [
        ("frac=0", ["frac", "(0, 1]"]),
        ("frac=1.5", ["frac", "(0, 1]"]),
        ("size=100", ["size", "multiple of 32"]),
        ("fraction=0.1", ["fraction", "frac, label_seed"]),
        ("preset=huge", ["preset", "smoke"]),
    ],
)
def test_wrong_config_value(tmp_path, arg, words):
    refused(train(tmp_path, arg), *words)
    assert not (tmp_path / "run").exists()


def test_wrong_override_file_and_flag(tmp_path):
    refused(train(tmp_path, "frac=1", "--config.loss.gama=1"), "gama")
    refused(train(tmp_path, "frac=1", "--config.train.batch=3"), "train.batch", "even")
    refused(train(tmp_path, "frac=1", "--config.loss.gamma=much"), "gamma")
    for dashes in ("--", "-"):
        refused(train(tmp_path, "frac=1", f"{dashes}config.method=fixmatch"), "method", "--config=FILE:method")
    refused(main("--config=configs/nothing.py"), "nothing.py")
    refused(main("--confg=configs/isic.py"), "confg")
    refused(main(), "--config is required")


def test_missing_zip(tmp_path):
    refused(train(zips(tmp_path, leave_out="ISBI2016_ISIC_Part1_Test_GroundTruth")), "Test_GroundTruth.zip", "manual")


def test_corrupt_jpeg(tmp_path):
    whole = encoded(np.random.default_rng(0).integers(0, 255, (60, 80, 3)), "JPEG")
    refused(train(zips(tmp_path, ISIC_0000002=(whole[: len(whole) // 2], None))), "ISIC_0000002.jpg", "Training_Data")


def test_mask_of_another_size(tmp_path):
    other = encoded(np.zeros((60, 81)), "PNG")
    refused(train(zips(tmp_path, ISIC_0000012=(None, other))), "ISIC_0000012_Segmentation.png", "81x60")


def test_a_missing_test_set_is_said_before_anything_is_trained(tmp_path):
    run = tmp_path / "run"
    arg = f"--config=configs/ph2.py:frac=1,preset=smoke,data_dir={zips(tmp_path)}"
    refused(main(arg, f"--workdir={run}"), "PH2 is not in", "manual_dir")
    assert not (run / "checkpoints").exists()


def test_workdir_of_another_run_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    config = tmp_path / "run" / "config.json"
    config.write_text('{"config": {"frac": 0.5}}')
    refused(train(zips(tmp_path)), "holds a run with", "--workdir")
    assert config.read_text() == '{"config": {"frac": 0.5}}'


def test_evaluate_without_a_run(tmp_path):
    refused(main(f"--workdir={tmp_path}", "--dataset=ph2", module="mira_u_jax.evaluate"), "config.json", "--workdir")
    refused(main("--dataset=ph2", module="mira_u_jax.evaluate"), "--workdir is required")


@pytest.mark.slow
def test_the_command_as_written_then_evaluate_elsewhere(tmp_path):
    """The smoke preset on drawn ISIC zips ends with everything DESIGN 6 names, and evaluates on a folder."""
    status, out, err = train(zips(tmp_path))
    assert status == 0, err
    assert "4 labelled of 4 present (official 900 of 900)" in out
    run = tmp_path / "run"
    for name in ("config.json", "metrics.jsonl", "evaluation.json", "evaluation.txt", "checkpoints/train", "figures"):
        assert (run / name).exists(), name
    assert list((run / "figures").glob("train_*.png"))
    folder = tmp_path / "mine"
    for part, suffix in (("images", ".png"), ("masks", "_Segmentation.png")):
        (folder / part).mkdir(parents=True)
        pixels = np.full((50, 70, 3), 200) if part == "images" else np.pad(np.full((20, 20), 255), ((10, 20), (20, 30)))
        (folder / part / f"one{suffix}").write_bytes(encoded(pixels, "PNG"))
    result = main(f"--workdir={run}", f"--dataset={folder}", f"--json={tmp_path / 'e.json'}", module="mira_u_jax.evaluate")
    assert result[0] == 0, result[2]
    assert '"images": 1' in (tmp_path / "e.json").read_text()


@pytest.mark.slow
def test_a_cell_of_a_table_is_run_once(tmp_path):
    """From the zips to results/a/CELL.json; the same command again starts nothing."""
    zips(tmp_path)
    args = ["--table=a", "--preset=smoke", "--index=7", f"--data_dir={tmp_path}", f"--runs={tmp_path / 'runs'}"]
    args += [f"--results={tmp_path / 'results'}"]
    status, out, err = main(*args, module="mira_u_jax.grid")
    assert status == 0 and "1 of 1 cells done" in out, err
    (kept,) = (tmp_path / "results" / "a").glob("*.json")
    assert kept.stem == "isic_smoke_frac1_supervised_l3_s3"
    result = json.loads(kept.read_text())
    assert set(result) >= {"config", "evaluation", "commit", "hardware", "seconds"}
    assert result["evaluation"]["labelled"]["images"] == 4 and result["evaluation"]["ece_calibrated"] >= 0
    assert len(kept.with_suffix(".csv").read_text().splitlines()) == 1 + result["evaluation"]["images"] == 3
    status, out, err = main(*args, module="mira_u_jax.grid")
    assert status == 0 and "workdir" not in out and "1 of 1 cells done" in out, err
    assert " done     isic_smoke_frac1_supervised_l3_s3" in main(*args, "--list", module="mira_u_jax.grid")[1]
    refused(main("--table=z", module="mira_u_jax.grid"), "--table=z", "table5")
