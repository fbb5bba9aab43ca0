"""What the documentation says to type: every command is read by its program, those of docs/usage.md are run."""

import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mira_u_jax import config as configuration

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^ *(?:\.venv/bin/)?python -m ((?:mira_u_jax|tfds_builders)\.\w+)(.*)$", re.MULTILINE)
PLACEHOLDERS = {"METHOD": "supervised", "=L": "=0", "=S": "=0", "=F": "=0.1"}
COMMANDS = ("main", "evaluate", "predict", "export", "report")
MODULES = (*(f"mira_u_jax.{name}" for name in COMMANDS), "tfds_builders.build")


def commands():
    for page in PAGES:
        for module, rest in COMMAND.findall(page.read_text()):
            yield pytest.param(module, rest.split("#")[0], id=f"{page.name} {module}{rest}"[:90])


@functools.cache
def help_of(module: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("module", "rest"), commands())
def test_a_command_has_the_flags_and_keys_it_is_written_with(module, rest):
    for flag in re.findall(r"--(?:\[no\])?([a-z_-]+)", rest):
        assert f"--{flag}" in help_of(module) or f"--[no]{flag}" in help_of(module), flag
    for file, arg in re.findall(r"--config=(configs/\w+\.py):?(\S*)", rest):
        for name, value in PLACEHOLDERS.items():
            arg = arg.replace(name, value)
        config = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config(arg.rstrip("."))
        if config.dataset != "folder" or config.files.images:
            configuration.check(config)


@pytest.mark.parametrize("module", MODULES)
def test_help_has_an_example(module):
    assert f"python -m {module} " in help_of(module)


def pages_python(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_commands_of_usage_run(smoke_run, synthetic_data_dir, tmp_path):
    """predict, export, the loader of the exported file, the data sets elsewhere. The folder run: tests/files_test.py."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(smoke_run)
    (tmp_path / "PHOTOS").mkdir()
    for i in range(2):
        Image.new("RGB", (40 + i, 30), (200, 150, 120)).save(tmp_path / "PHOTOS" / f"{i}.jpg")
    np.save(tmp_path / "images.npy", np.zeros((2, 32, 32, 3), np.uint8))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": synthetic_data_dir}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

    def call(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text, ran = (ROOT / "docs" / "usage.md").read_text(), []
    for module, rest in COMMAND.findall(text):
        if module in ("mira_u_jax.predict", "mira_u_jax.export") and "..." not in rest:
            call(sys.executable, "-m", module, *rest.split())
            ran.append(module)
    assert ran == ["mira_u_jax.predict", "mira_u_jax.export"]
    assert len(list((tmp_path / "MASKS").glob("*_mask.png"))) == 2
    loader, reuse = pages_python("usage.md")
    call(sys.executable, "-c", loader)
    assert call(sys.executable, "-c", reuse).split() == ["400", "200", "40", "(128,", "128,", "3)"]
    read = "\n".join(re.findall(r"^    ((?:builder|train) = .*)$", text, re.MULTILINE))
    read = read.replace("DATA_DIR", synthetic_data_dir)
    elsewhere = (  # where our code cannot be imported
        "import sys; sys.modules['tfds_builders'] = sys.modules['mira_u_jax'] = None\n"
        f"import tensorflow_datasets as tfds\n{read}\nprint(len(train), train[3]['mask'].shape)"
    )
    assert call(sys.executable, "-c", elsewhere).split() == ["400", "(128,", "128,", "1)"]


def test_notebooks_are_valid():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
