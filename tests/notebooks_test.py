"""Both notebooks from top to bottom, at toy size, each in a process of its own; no output is kept in them."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOY = {'PRESET = "quick"': 'PRESET = "smoke"', "STEPS = 100": "STEPS = 20"}
SHELL = """
import os, subprocess
def shell(command):
    subprocess.run(command, shell=True, check=True)
"""


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def script(path) -> str:
    """The code cells as one program: `!command` and `%cd folder` as IPython reads them, {expressions} filled in."""
    lines = "\n".join("".join(cell["source"]) for cell in cells(path)).splitlines()
    lines = [re.sub(r"^(\s*)!(.*)$", r"\1shell(f'''\2''')", line) for line in lines]
    text = SHELL + "\n".join(re.sub(r"^(\s*)%cd (.*)$", r"\1os.chdir(f'''\2''')", line) for line in lines)
    for full, toy in TOY.items():
        text = text.replace(full, toy)
    return text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs(path):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(path))
    assert sum(path.read_text().count(json.dumps(full)[1:-1]) for full in TOY) == 1  # its one knob for its size


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, synthetic_data_dir):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    settings = {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": synthetic_data_dir, "MPLBACKEND": "Agg"}
    settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    (tmp_path / "notebook.py").write_text(script(path))
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if path.stem == "colab":
        assert len(list((tmp_path / "runs" / "notebook_masks").glob("*_mask.png"))) == 6 and "Dice 0." in done.stdout
    else:
        first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups())
        assert last < first
