"""Masks for images: what a trained run finds in files of your own.

    python -m mira_u_jax.predict --workdir=DIR --input=FILES_OR_FOLDER --output=FOLDER

Examples: --input=photos, --input a.jpg b.png, --input='photos/**/*.jpg', --input=photos.zip, or a list on standard
input: find photos -name '*.jpg' | python -m mira_u_jax.predict --input=- ...

FOLDER gets, at the size of each image, <id>_mask.png (0 or 255), <id>_overlay.png (the outline, and in red where the passes
disagree), <id>_sigma.png (that disagreement: value / 510, from 0 to .5), with --probability also <id>_probability.png (value
/ 255: the mean of the passes after the run's temperature, of which calibration is measured) and one line in predictions.csv,
whose other lines, of earlier calls, stay. A file that cannot be read is left out and named at the end, and in failed.txt;
the exit status is then 2.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import functools
import io
import pathlib
import sys
import time

import cv2
import jax
import numpy as np
from absl import flags
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.special import expit

from mira_u_jax import command, inputs, selective, trained, whole
from mira_u_jax.errors import UserError
from mira_u_jax.trained import at_size, batched, mask_of
from tfds_builders import common
from tfds_builders.common import DataError

COLUMNS = ("id", "area_share", "mean_sigma", "doubt", "border_touched", "seconds")
SOFTWARE = "mira_u_jax.predict"  # what its pictures say wrote them
SIGNED = PngInfo()
SIGNED.add_text("Software", SOFTWARE)
NAMED = 5  # files that the last line names; failed.txt names all


@dataclasses.dataclass
class Item:
    """One image on its way: pixels (h, w, 3) uint8, square (s, s, 3) uint8, maps as trained.look's, (s, s) each."""

    id: str
    pixels: np.ndarray
    square: np.ndarray
    seconds: float  # its own reading, its share of the batch, its writing
    maps: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def predict(
    workdir, files: dict[str, common.File], output, *, network: str = "student", passes: int = 0, batch: int = 0,
    threads: int = 4, probability: bool = False, flips: bool | None = None, largest: bool | None = None,
) -> dict[str, str]:
    """Write what FOLDER gets for `files` {id: file}; returns {id: why} of those that could not be read.

    passes: of dropout, behind sigma; 0 as the run is evaluated; batch: images at once, 0 by their size; probability: write
    its maps too; network, flips, largest: as trained.Predictor. Reads and writes on `threads` threads beside the device, a
    few batches ahead at most, so that memory does not grow with the number of files. One compilation. Raises UserError;
    OSError where the output cannot be written.
    """
    predictor = trained.Predictor(workdir, network, flips, largest)
    output = pathlib.Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file: give a folder")
    output.mkdir(parents=True, exist_ok=True)
    sheet, report = output / "predictions.csv", output / "failed.txt"
    for path in (sheet, report, *(output / f"{id}_{part}.png" for id in files for part in inputs.PARTS)):
        if foreign(path):  # an outline drawn by hand, perhaps
            raise UserError(f"{path} is not of predict's making and would be overwritten: give another --output")
    batch = min(batch or predictor.batch, len(files))
    look_at = functools.partial(trained.look, network=predictor.network, passes=passes or predictor.passes)
    step = functools.partial(jax.jit(look_at), predictor.params)
    failed, progress = {}, Progress(len(files))

    def good(items):
        for id, item in items:
            if isinstance(item, Item):
                yield item
            else:
                failed[id] = str(item)
                progress.add()

    keep_others(sheet, files)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool, sheet.open("a", newline="") as f:
        table = csv.writer(f)
        read = ahead(pool, functools.partial(read_item, size=predictor.settings.size), files.items(), threads)
        looked = (item for group in batched(good(read), batch) for item in with_maps(step, group, batch))
        heat = predictor.temperature if probability else None
        if heat == 1:
            print(f"no temperature was fitted for {predictor.name}: probabilities are the mean of its passes", flush=True)
        write = functools.partial(write_item, output=output, temperature=heat, largest=predictor.largest)
        for row in ahead(pool, write, looked, threads):
            table.writerow(row)
            f.flush()
            progress.add()
    progress.close()
    report.unlink(missing_ok=True)  # of an earlier call
    if failed:
        report.write_text("".join(f"{files[id]}\t{why}\n" for id, why in failed.items()))
    return failed


def keep_others(sheet: pathlib.Path, ids):
    """Leave predictions.csv with its header and those rows of earlier calls, whole ones, whose image is not one of `ids`."""
    before, text = [], io.StringIO(newline="")
    if sheet.exists():
        with sheet.open(newline="") as f:
            before = list(csv.reader(f))[1:]
    csv.writer(text).writerows([COLUMNS, *(row for row in before if len(row) == len(COLUMNS) and row[0] not in ids)])
    whole.write(sheet, text.getvalue())


def ahead(pool, function, items, count: int):
    """function(item) of every item, in order, `count` of them under way on the pool."""
    queue = collections.deque()
    for item in items:
        queue.append(pool.submit(function, item))
        if len(queue) > count:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


def read_item(named, *, size: int) -> tuple[str, Item | DataError]:
    """(id, Item) of (id, file), decoded and squashed; instead of the Item why it could not be."""
    started, (id, file) = time.perf_counter(), named
    try:
        pixels = inputs.pixels(file)
        return id, Item(id, pixels, common.squash(pixels, size), time.perf_counter() - started)
    except DataError as error:
        return id, error


def with_maps(step, items, batch: int):
    """The items of a batch with their maps; the last batch is padded."""
    started = time.perf_counter()
    maps = jax.device_get(step(trained.padded([item.square for item in items], batch)))
    for i, item in enumerate(items):
        item.maps = {name: values[i] for name, values in maps.items()}
        item.seconds += (time.perf_counter() - started) / len(items)
    return items


def write_item(item: Item, *, output: pathlib.Path, temperature: float | None = None, largest: bool = False) -> tuple:
    """Write the pictures of an item, that of its probability only at a temperature; returns its row of predictions.csv."""
    started, shape = time.perf_counter(), item.pixels.shape
    logits = at_size(item.maps["logits"], shape)
    mask = mask_of(logits, largest=largest)
    sigma = at_size(item.maps["sigma"], shape)
    save(output / f"{item.id}_mask.png", mask.astype(np.uint8) * 255)
    save(output / f"{item.id}_sigma.png", (sigma * 510).clip(0, 255).round().astype(np.uint8))
    save(output / f"{item.id}_overlay.png", overlay(item.pixels, mask, sigma))
    if temperature:
        p = expit(at_size(item.maps["mean_logits"], shape) / temperature)
        save(output / f"{item.id}_probability.png", (p * 255).round().astype(np.uint8))
    edge = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    seconds = item.seconds + time.perf_counter() - started
    shown = (mask.mean(), item.maps["sigma"].mean(), selective.doubt(sigma, mask))
    return item.id, *(f"{value:.6f}" for value in shown), int(edge), f"{seconds:.3f}"


def save(path: pathlib.Path, pixels: np.ndarray):
    """PNG of uint8 (h, w[, 3]) that says whose it is."""
    whole.write(path, common.png(pixels, pnginfo=SIGNED))


def foreign(path: pathlib.Path) -> bool:
    """Whether a file is there that predict did not write: a picture without its signature, a table of other columns.

    An empty table is of a call that ended before its first row.
    """
    try:
        if path.suffix == ".txt":
            return not all(b"\t" in line for line in path.read_bytes().splitlines())
        if path.suffix == ".csv":
            with path.open("rb") as table:
                header = table.readline()
            return bool(header) and header.strip() != ",".join(COLUMNS).encode()
        with Image.open(path) as image:
            return image.info.get("Software") != SOFTWARE
    except FileNotFoundError:
        return False
    except OSError:  # no picture
        return True


def overlay(pixels: np.ndarray, mask: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3): the image, red where sigma (h, w) is high, and the outline of mask (h, w)."""
    red = (np.clip(sigma / 0.3, 0, 1) * 0.6).astype(np.float32)[..., None]  # .3, as the pictures of a training run
    drawn = np.ascontiguousarray((pixels * (1 - red) + np.array([255, 0, 0], np.float32) * red).astype(np.uint8))
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    width = max(round(max(mask.shape) / 400), 1)
    cv2.drawContours(drawn, outlines, -1, (0, 0, 0), 3 * width)  # a dark rim, to be seen on any skin
    cv2.drawContours(drawn, outlines, -1, (255, 255, 0), width)
    return drawn


class Progress:
    """A line on the terminal: done, speed and time left; nothing where stderr is no terminal."""

    def __init__(self, total: int):
        self.total, self.done, self.started, self.shown = total, 0, time.perf_counter(), sys.stderr.isatty()

    def add(self):
        self.done += 1
        speed = self.done / max(time.perf_counter() - self.started, 1e-9)
        left = int((self.total - self.done) / speed)
        bar = "#" * (24 * self.done // self.total)
        text = f"\r[{bar:<24}] {self.done}/{self.total}  {speed:.1f} images/s  {left // 60}:{left % 60:02d} left "
        if self.shown:
            print(text, end="", file=sys.stderr, flush=True)

    def close(self):
        if self.shown:
            print(file=sys.stderr)


def main():
    f = flags.FLAGS
    for name, least in (("batch", 0), ("threads", 1)):
        if getattr(f, name) < least:
            raise UserError(f"--{name}={getattr(f, name)}: it must be an integer >= {least}")
    trained.check_passes(f.passes)
    files = inputs.find(f.input, ignore=f.output)
    started = time.perf_counter()
    failed = predict(
        f.workdir, files, f.output, passes=f.passes, batch=f.batch, threads=f.threads, network=f.network,
        probability=f.probability, flips=f.flips, largest=f.largest,
    )
    done, seconds = len(files) - len(failed), time.perf_counter() - started
    print(f"{done} masks in {f.output}, {seconds:.1f} s, compilation included", flush=True)
    if failed:
        reasons = "; ".join(list(failed.values())[:NAMED])
        more = f"; {len(failed) - NAMED} more in {f.output}/failed.txt" if len(failed) > NAMED else ""
        raise UserError(f"{len(failed)} of {len(files)} files have no mask: {reasons}{more}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run of main.")
    flags.DEFINE_multi_string("input", None, "File, folder, zip or glob; may be given again. -: a list on standard input.")
    flags.DEFINE_string("output", None, "Folder for masks, overlays, deviations and predictions.csv.")
    flags.DEFINE_integer("passes", 0, "Dropout passes behind sigma; 0: as the run is evaluated.")
    flags.DEFINE_integer("batch", 0, "Images at once; 0: by their size.")
    flags.DEFINE_integer("threads", 4, "Threads that read and write.")
    flags.DEFINE_bool("probability", False, "Write <id>_probability.png too: of lesion, calibrated, value / 255.")
    flags.DEFINE_bool("largest", None, "Keep the largest connected part of each mask; default as the run is evaluated.")
    flags.DEFINE_bool("flips", None, "Average over the four flips of an image; default as the run is evaluated.")
    flags.DEFINE_enum("network", "student", trained.NETWORKS, "Whose average predicts; all: the mean of both.")
    command.run(main, required=("workdir", "input", "output"), rest="input")
