"""Broken, foreign and hostile input: each gives its one line and exit status, the table of docs/reliability.md.

    python tests/hostile_test.py    writes that table anew
"""

import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import resource
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TABLE = ROOT / "docs" / "reliability.md"
MAIN, EVALUATE, BUILD = "mira_u_jax.main", "mira_u_jax.evaluate", "tfds_builders.build"
PREDICT, EXPORT, REPORT, GRID = (f"mira_u_jax.{name}" for name in ("predict", "export", "report", "grid"))
ISIC = "--config=configs/isic.py:preset=smoke"
LIMIT_S, LIMIT_MB = 120, 2048

# --- a command in a process of its own, forked from one that has imported everything -------------------------------------


def run(module, argv, folder):
    """(status, [lines on stderr], peak MB) of `python -m module argv`, run from the project."""
    if module == EVALUATE:  # it computes, which a forked process does not do well
        command = [sys.executable, "-m", module, *argv]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
        return done.returncode, [line for line in done.stderr.splitlines() if line], 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mira_u_jax.train", "mira_u_jax.command", "configs.common"])
    process = context.Process(target=child, args=(module, argv, str(folder)))
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        return "hangs", [], 0
    err, peak = pathlib.Path(folder, "err").read_text(), pathlib.Path(folder, "peak")
    return process.exitcode, [line for line in err.splitlines() if line], int(peak.read_text()) if peak.exists() else 0


def child(module, argv, folder):
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.chdir(ROOT)
    os.environ["MIRA_U_CACHE"] = f"{folder}/cache"
    sys.argv = [module, *argv]
    warnings.simplefilter("ignore")  # runpy's, about what is imported already
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        pathlib.Path(folder, "peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


# --- what is broken -------------------------------------------------------------------------------------------------------

SKIN = np.full((60, 80, 3), (210, 170, 150), np.uint8)
LESION = np.pad(np.full((20, 30), 255, np.uint8), ((20, 20), (25, 25)))


def encoded(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, format=format, **options)
    return buffer.getvalue()


def bomb(side):
    """A PNG of side x side black pixels that takes kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join([packer.compress(bytes(side * 3 + 1)) for _ in range(side)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated():
    frames = [Image.fromarray(np.full((60, 80), grey, np.uint8)) for grey in (10, 200)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def isic(folder, *, image=None, mask=None, extra=None, leave_out=(), name="ISIC_0000000.jpg", mask_name=None, zipped=True):
    """The four official zips (or folders) in folder/zips, one image each; what is given replaces the first training one."""
    base = folder / "zips"
    base.mkdir()
    for part, i in (("Training", "ISIC_0000000"), ("Test", "ISIC_0000003")):
        first = part == "Training"
        for kind, file, data in (
            ("Data", name if first else f"{i}.jpg", (image if first else None) or encoded(SKIN, "JPEG")),
            ("GroundTruth", (first and mask_name) or f"{i}_Segmentation.png", (mask if first else None) or encoded(LESION)),
        ):
            if f"{part}_{kind}" in leave_out:
                continue
            path = base / f"ISBI2016_ISIC_Part1_{part}_{kind}"
            if zipped:
                with zipfile.ZipFile(f"{path}.zip", "w") as z:
                    z.writestr(file, data)
                    for more, content in (extra or {}).items() if first and kind == "Data" else ():
                        z.writestr(more, content)
            else:
                path.mkdir()
                (path / file).write_bytes(data)
    return BUILD, ["isic2016", "--config=128px", f"--manual_dir={base}", f"--data_dir={folder / 'built'}"]


def zips_but(folder, name, content):
    command = isic(folder)
    path = folder / "zips" / f"ISBI2016_ISIC_Part1_{name}.zip"
    path.write_bytes(content(path.read_bytes()))
    return command


def link_out(folder):
    command = isic(folder, zipped=False)
    (folder / "secret.jpg").write_bytes(encoded(SKIN, "JPEG"))
    (folder / "zips" / "ISBI2016_ISIC_Part1_Training_Data" / "ISIC_0000001.jpg").symlink_to(folder / "secret.jpg")
    return command


def train(*argv):
    return lambda folder: (MAIN, [*argv, f"--workdir={folder / 'run'}"])


def trained_elsewhere(folder, text):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(text)
    return MAIN, [f"{ISIC},frac=1", f"--workdir={folder / 'run'}", f"--config.data_dir={isic_data(folder)}"]


def isic_data(folder):
    """A data_dir where the smallest ISIC is built already."""
    module, argv = isic(folder)
    from tfds_builders import build

    with contextlib.redirect_stdout(io.StringIO()):
        assert build.main(argv) == 0
    return folder / "built"


def measured(folder, *argv, config=None):
    """evaluate on a workdir that holds a configuration, of the smoke preset unless another is given."""
    from configs import common
    from mira_u_jax import config as configuration

    text = config or json.dumps({"config": json.loads(configuration.check(common.get_config("preset=smoke")).to_json())})
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(text)
    return EVALUATE, [f"--workdir={folder / 'run'}", "--dataset=isic2016", *argv]


def locked(folder):
    from mira_u_jax import workdir

    held = workdir.claimed(folder / "run")
    held.__enter__()
    locked.held = held  # until the next test
    return train(ISIC, f"--config.data_dir={folder}")(folder)


def pickled(folder):
    """A checkpoint whose every file is a payload that would write a file when it is unpickled."""
    command = measured(folder)
    step = folder / "run" / "checkpoints" / "train" / "3"
    for name in ("_CHECKPOINT_METADATA", "default/_METADATA", "default/manifest.ocdbt", "default/d/0"):
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(pickle.dumps(Payload(str(folder / "unpickled"))))
    return command


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def code(text):
    """A value that would write a file if somebody evaluated it."""
    return lambda folder: train(ISIC, text.format(f"__import__('os').system('touch {folder}/evaluated')"))(folder)


OTHER_IDS = {"ISIC_9999999.jpg": encoded(SKIN, "JPEG")}
def below(folder, module, *argv):
    """A command whose path, {}, is a file."""
    (folder / "file").write_text("x")
    return module, [arg.format(folder / "file") for arg in argv]


CASES = {  # what is wrong -> a function of an empty folder that makes it and gives (module, argv)
    # configurations and flags
    "a key that is not there": train("--config=configs/isic.py:fraction=0.1"),
    "a value out of range": train("--config=configs/isic.py:frac=1.5"),
    "a value of another type": train("--config=configs/isic.py:seed=first"),
    "a value that is not a number": train("--config=configs/isic.py:frac=nan"),
    "no value": train("--config=configs/isic.py:frac"),
    "a preset that is not there": train("--config=configs/isic.py:preset=huge"),
    "an override of a key that is not there": train(ISIC, "--config.loss.gama=1"),
    "an override before its configuration": train("--config.loss.gamma=1", ISIC),
    "an override of another type": train(ISIC, "--config.loss.gamma=much"),
    "an override of what a preset stands for": train(ISIC, "--config.method=fixmatch"),
    "an odd batch": train(ISIC, "--config.train.batch=3"),
    "one checkpoint to keep": train(ISIC, "--config.train.keep=1"),
    "a learning rate that is not finite": train(ISIC, "--config.optim.lr=nan"),
    "code in a number": code("--config.loss.gamma={}"),
    "code in a text": code("--config.pseudo.label={}"),
    "code in a tuple": code("--config.student.widths={}"),
    "code after the colon": lambda folder: train(f"{ISIC},seed=__import__('os').system('touch {folder}/evaluated')")(folder),
    "a configuration that is no Python": lambda f: (f / "c.py").write_text("frac 0.1\n") and train(f"--config={f}/c.py")(f),
    "a configuration file that is not there": train("--config=configs/nothing.py"),
    "a flag that is not there": train(ISIC, "--workdri=x"),
    "a word too many": train(ISIC, "run"),
    "no configuration": train(),
    "channels that make no heads": train(ISIC, "--config.student.widths=(8,8,8,56,56)", "--config.student.head_width=9"),
    "images of one's own in no folder": train("--config=configs/folder.py:images=NONE,masks=NONE,preset=smoke"),
    "a process without its cluster": train(ISIC, "--process=1"),
    "a coordinator without a port": train(ISIC, "--coordinator=host", "--processes=2", "--process=1"),
    # workdirs
    "another run in the workdir": locked,
    "a workdir that cannot be written": lambda f: (MAIN, [ISIC, "--workdir=/proc/run", f"--config.data_dir={f}"]),
    "a workdir that is a file": lambda f: ((f / "run").write_text("x") and train(ISIC, f"--config.data_dir={f}")(f)),
    "a workdir of another configuration": lambda f: trained_elsewhere(f, '{"config": {"frac": 0.5}}'),
    "a config.json that is cut off": lambda f: trained_elsewhere(f, '{"config": {"fr'),
    "evaluation of an empty workdir": lambda f: (EVALUATE, [f"--workdir={f}", "--dataset=isic2016"]),
    "evaluation before a checkpoint": measured,
    "a config.json that is no object": lambda f: measured(f, config="[]"),
    "a checkpoint of pickled payloads": pickled,
    "prediction of nothing": lambda f: (PREDICT, [f"--workdir={f}", f"--input={f}", f"--output={f}/masks"]),
    "export without a name for the file": lambda f: (EXPORT, [f"--workdir={f}", f"--output={f}/net"]),
    "a report of nothing": lambda f: (REPORT, [f"--runs={f}", f"--output={f}/report"]),
    # what is written
    "a report where a file lies": lambda f: below(f, REPORT, "--runs=results/synthetic", "--output={}"),
    "runs of a grid below a file": lambda f: below(f, GRID, "--table=a", "--preset=smoke", "--runs={}/runs"),
    "a data_dir below a file": lambda f: below(f, BUILD, "synthetic_lesions", "--data_dir={}/data"),
    # sources of data
    "nothing to build from": lambda f: (BUILD, ["ph2", f"--data_dir={f}"]),
    "a manual_dir that is not there": lambda f: (BUILD, ["isic2016", f"--manual_dir={f}/no", f"--data_dir={f}"]),
    "a zip that is missing": lambda f: isic(f, leave_out=("Test_Data",)),
    "a zip that is cut off": lambda f: zips_but(f, "Training_Data", lambda data: data[: len(data) // 2]),
    "a zip of zero bytes": lambda f: zips_but(f, "Training_Data", lambda data: b""),
    "a web page for a zip": lambda f: zips_but(f, "Test_Data", lambda data: b"<!DOCTYPE html><html>Sign in</html>"),
    "a flipped byte in a zip": lambda f: zips_but(f, "Training_Data", lambda data: data[:200] + b"\xff" + data[201:]),
    "../ in a zip": lambda f: isic(f, extra={"../../evil.jpg": encoded(SKIN, "JPEG")}),
    "an absolute name in a zip": lambda f: isic(f, extra={"/tmp/evil.jpg": encoded(SKIN, "JPEG")}),
    "a link out of the folder": link_out,
    "an id that is not official": lambda f: isic(f, extra=OTHER_IDS),
    "an id twice": lambda f: isic(f, extra={"again/ISIC_0000000.JPG": encoded(SKIN, "JPEG")}),
    "an image without its mask": lambda f: isic(f, extra={"ISIC_0000001.jpg": encoded(SKIN, "JPEG")}),
    # images
    "an image of zero bytes": lambda f: isic(f, image=b"\n"),
    "a web page for an image": lambda f: isic(f, image=b"<!DOCTYPE html><html>Not found</html>"),
    "an image that is cut off": lambda f: isic(f, image=encoded(SKIN, "JPEG")[:400]),
    "an image of 20,000 x 20,000": lambda f: isic(f, image=bomb(20_000)),
    "an image of 9,200 x 9,200": lambda f: isic(f, image=bomb(9_200)),
    "an image of 1 x 1": lambda f: isic(f, image=encoded(SKIN[:1, :1])),
    "an animated image": lambda f: isic(f, image=animated()),
    "an image of floats": lambda f: isic(f, image=encoded(Image.fromarray(np.ones((60, 80), np.float32)), "TIFF")),
    "an image of 32 bits": lambda f: isic(f, image=encoded(Image.fromarray(np.full((60, 80), 1 << 20, np.int32)), "TIFF")),
    "a mask of another size": lambda f: isic(f, mask=encoded(LESION[:, :-1])),
    "a mask turned against its image": lambda f: isic(f, mask=encoded(LESION.T.copy())),
    "a mask of class indices": lambda f: isic(f, mask=encoded(LESION // 255 * 2)),
    "a mask of zero bytes": lambda f: isic(f, mask=b"\n"),
}


def shown(text, folder):
    """A line as the table has it: the test's folder is DIR, numbers that differ between machines are gone."""
    text = text.replace(str(folder.resolve()), "DIR").replace(str(folder), "DIR").replace(str(ROOT), ".")
    text = re.sub(r"\(\d+ keys differ\)", "(... keys differ)", text)
    return re.sub(r"sha256 \w+|object at 0x\w+", "...", text).replace("|", "\\|")


def outcome(name, folder):
    """The row of a case."""
    module, argv = CASES[name](folder)
    status, lines, peak = run(module, argv, folder)
    assert len(lines) == 1, f"{name}: {status} {lines}"
    assert peak < LIMIT_MB, f"{name}: {peak} MB"
    left = {path.name for path in folder.glob("*")} & {"evaluated", "unpickled"}
    assert not left and not pathlib.Path("/tmp/evil.jpg").exists(), f"{name}: {left}"
    assert not list(folder.rglob("dataset_info.json")) or "built" in str(argv) and module != BUILD, f"{name}: looks whole"
    return f"| {name} | {status} | `{shown(lines[0], folder)}` |"


def written():
    """{what: row} of the table in the documentation."""
    rows = [line for line in TABLE.read_text().splitlines() if re.match(r"\| .+ \| \d+ \| `", line)]
    return {row.split(" | ")[0][2:]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_its_line_of_the_table(name, tmp_path):
    assert outcome(name, tmp_path) == written()[name]


def test_the_table_has_these_rows_and_no_traceback():
    assert list(written()) == list(CASES) and len(CASES) >= 40
    assert all(re.search(r"\| [12] \| `(error|failed)", row) for row in written().values())


if __name__ == "__main__":
    table = []
    for case in CASES:
        where = pathlib.Path(tempfile.mkdtemp())
        try:
            table.append(outcome(case, where))
        except AssertionError as error:
            table.append(f"| {case} | ? | `{error}` |")
        print(table[-1], flush=True)
        shutil.rmtree(where)
    text = TABLE.read_text()
    start, end = text.index("| input |"), text.index("\n\n", text.index("| input |"))
    TABLE.write_text(text[:start] + "\n".join(["| input | status | line |", "|---|---|---|", *table]) + text[end:])
