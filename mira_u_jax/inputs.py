"""Which images a person means: files, folders, zips, globs and lists of them, each with a name of its own."""

import collections
import glob
import pathlib
import re
import sys
from collections.abc import Iterable

import numpy as np

from mira_u_jax.errors import UserError
from tfds_builders import common

IMAGES = (".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
NO_IMAGE = re.compile(  # what lies beside images in PH2's folders, and the outlines of ISIC
    r"(^|/)(IMD\d+_(lesion|roi)/.*|IMD\d+_(lesion|R\d+_Label\d+)\.[^/]*|[^/]*_(Segmentation|superpixels)\.[^/]*)$",
    re.IGNORECASE,
)
PARTS = ("mask", "overlay", "sigma", "probability")  # predict writes <id>_<part>.png
WRITTEN = re.compile(rf"_({'|'.join(PARTS)})\.png$")


def find(inputs: Iterable[str], *, ignore=None) -> dict[str, common.File]:
    """id -> file of all images that `inputs` name, in their order.

    inputs: files, folders, zips or globs; "-" reads one such name a line from standard input. Of folders (with the folders
    in them), zips and globs: what is an image by its name; a file given as such is read whatever its name. Hidden files and
    the outlines of ISIC and PH2 are never inputs. ignore: the folder of the output, of which what predict writes is left
    out. The id is the name without extension; where two share it, the path with / written as _. Raises UserError where
    nothing is left and for what does not exist; a line of a list that does not exist is a file that cannot be read.
    """
    inputs = list(inputs)
    listed = [line for line in sys.stdin.read().splitlines() if line.strip()] if "-" in inputs else []
    names = [(name, False) for name in inputs if name != "-"] + [(name, True) for name in listed]
    ignore = pathlib.Path(ignore).resolve() if ignore else None
    written = lambda at: ignore in at.parents and WRITTEN.search(at.name)  # noqa: E731
    found = {_where(file): file for name, listed in names for file in _expand(name, listed)}
    files = [file for at, file in found.items() if not NO_IMAGE.search(at.as_posix()) and not written(at)]
    if not files:
        raise UserError(f"--input={' '.join(inputs)}: no images there; give files, folders, zips or globs, or - for a list")
    return _named(files)


def _expand(name: str, listed: bool = False) -> list[common.File]:
    path = pathlib.Path(name).expanduser()
    if path.is_dir() or path.suffix.lower() == ".zip" and path.is_file():
        return [file for file in common.Source(path, links=True).files() if is_image(file.name)]
    found = [] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if path.is_file() or listed and not found:
        return [common.File(_Folder(path.parent), path.name)]
    if not found:
        raise UserError(f"--input: {name} does not exist (for several, give --input more than once, a glob in quotes or -)")
    shown = [one for one in found if "__MACOSX" not in pathlib.Path(one).parts]
    return [file for one in shown if pathlib.Path(one).is_dir() or is_image(one) for file in _expand(one)]


class _Folder(common.Source):
    """The folder of a file that was named: not listed, as it may be large."""

    def __init__(self, path):
        self.path, self._zip, self.names = pathlib.Path(path), None, []


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return pathlib.Path(name).suffix.lower() in IMAGES


def _where(file: common.File) -> pathlib.Path:
    return (file.source.path / file.name).resolve()


def _named(files: list[common.File]) -> dict[str, common.File]:
    """Each file under the shortest of its names that no other file has."""
    ids, taken, left = {}, set(), files
    for name in NAMES:
        names = [name(file).lower() for file in left]  # a disk may not tell a.png from A.png
        count = collections.Counter(names)
        for file, same in zip(left, names, strict=True):
            if count[same] == 1 and same not in taken:
                ids[file] = name(file)
        taken |= {i.lower() for i in ids.values()}
        left = [file for file in left if file not in ids]
    if left:
        raise UserError(f"--input: {left[0]} would be written under the name of another file: give it in a call of its own")
    return {ids[file]: file for file in files}


NAMES = (  # of a file, without what a file name cannot hold
    lambda file: pathlib.Path(file.name).stem,
    lambda file: str(pathlib.PurePosixPath(file.name).with_suffix("")).replace("/", "_"),
    lambda file: file.name.replace("/", "_").replace(".", "_"),
    lambda file: _where(file).as_posix().strip("/").replace("/", "_").replace(".", "_"),
)


def pixels(file: common.File, content: bytes | None = None) -> np.ndarray:
    """uint8 (h, w, 3) of a file, as it is stored: an orientation tag turns nothing. Raises DataError.

    content: its bytes, where they have been read.
    """
    return np.asarray(common.decode(file.read() if content is None else content, file).convert("RGB"))
