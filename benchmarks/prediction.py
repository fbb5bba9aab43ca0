"""How fast `predict` turns photographs into masks on this machine, and how much memory it holds meanwhile.

    python -m benchmarks.prediction [--images=200] [--workdir=DIR | --size=128 --passes=8] [--json=FILE]

Without DIR, a run of main, it trains one of two steps on drawn images, as weights decide nothing here. Then it writes drawn
photographs as JPEG (--width=768 --height=560) and calls the command on them as a user would. Printed and written: images/s
of the whole command, and without the time until the first mask (start and compilation); memory held at a tenth, a half and
the end of the images. More than 200 images are the same 200 again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import cv2

from mira_u_jax import config as configuration
from mira_u_jax.train import facts
from tfds_builders.synthetic_lesions import render

DRAWN = 200
POLL = 0.2  # seconds


def photographs(folder: pathlib.Path, count: int, width: int, height: int):
    """`count` JPEG files of height x width pixels in a new folder, no more than DRAWN of them different."""
    folder.mkdir()
    for i in range(count):
        file = folder / f"{i:05}.jpg"
        if i < DRAWN:
            image, _ = render.render(i, 256)
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(file), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        else:
            file.hardlink_to(folder / f"{i % DRAWN:05}.jpg")


def trained(workdir: pathlib.Path, size: int, passes: int):
    """A run of two steps with the networks of preset=cpu128."""
    arg = f"configs/synthetic.py:preset=cpu128,method=supervised,size={size}"
    keys = {"train.steps": 2, "evaluation.passes": passes}
    args = [f"--config={arg}", f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in keys.items())]
    subprocess.run([sys.executable, "-m", "mira_u_jax.main", *args], check=True, stdout=subprocess.DEVNULL)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds now (Linux)."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def watched(workdir: pathlib.Path, photos: pathlib.Path, output: pathlib.Path) -> list[tuple[float, int, int]]:
    """(seconds since the start, masks so far, bytes held) a few times a second while the command runs."""
    command = [sys.executable, "-m", "mira_u_jax.predict", f"--workdir={workdir}", f"--input={photos}", f"--output={output}"]
    started, seen = time.perf_counter(), []
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            done = sum(1 for _ in output.glob("*_mask.png")) if output.exists() else 0
            held = resident(process.pid)
            if held:  # 0 when it has just ended
                seen.append((time.perf_counter() - started, done, held))
            time.sleep(POLL)
    if process.returncode:
        raise SystemExit(f"predict ended with status {process.returncode}")
    return [*seen, (time.perf_counter() - started, sum(1 for _ in output.glob("*_mask.png")), seen[-1][2])]


def rates(seen: list[tuple[float, int, int]], images: int) -> dict:
    """The figures of a command that was watched to its end."""
    first, last = next(item for item in seen if item[1]), seen[-1]
    held = {share: next(item for item in seen if item[1] >= share * images)[2] for share in (0.1, 0.5, 1)}
    return {
        "images": images, "masks": last[1], "seconds": round(last[0], 1), "images_per_s": round(images / last[0], 2),
        "until_first_mask_s": round(first[0], 1),
        "images_per_s_after": round((last[1] - first[1]) / max(last[0] - first[0], 1e-9), 2),
        "memory_mb": {f"{share:.0%}": held[share] >> 20 for share in held},
        "most_memory_mb": max(item[2] for item in seen) >> 20,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, usual in (("images", 200), ("size", 128), ("passes", 8), ("width", 768), ("height", 560)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--workdir", type=pathlib.Path, help="a run that is there; --size and --passes are then its own")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        work, photos, output = (pathlib.Path(folder) / name for name in ("run", "photos", "masks"))
        if args.workdir:
            work = args.workdir
        else:
            trained(work, args.size, args.passes)
        settings = configuration.load(work)
        photographs(photos, args.images, args.width, args.height)
        row = rates(watched(work, photos, output), args.images)
    row = {
        "name": "predict", "size": settings.size, "passes": settings.evaluation.passes,
        "width": args.width, "height": args.height, **row,
    }
    print(json.dumps(row, indent=1))
    if args.json:
        args.json.write_text(json.dumps([row | facts()], indent=1) + "\n")


if __name__ == "__main__":
    main()
