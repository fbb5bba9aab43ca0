"""Images of your own, with outlines for some or for none: what lies in the folders, what is wrong with it, and its rows."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from mira_u_jax import inputs
from mira_u_jax.errors import UserError
from tfds_builders import common
from tfds_builders.common import DataError, File

SUFFIXES = ("_Segmentation", "_mask")  # of an outline's name, or none: ISIC's, and what predict writes
SHOWN = 10  # wrong files that are printed


@dataclasses.dataclass(frozen=True)
class Found:
    """What two folders hold, by id; `images` and `masks` without those in `wrong`."""

    images: dict[str, File]
    masks: dict[str, File]  # the outlines of some of the images
    wrong: dict[str, str]  # file: why it cannot be used
    notes: list[str]  # lines on what was found
    sha256: dict[File, str]  # of the bytes of all of these


class FileRows(Sequence):
    """Rows {"image": (h, w, 3), "mask": (h, w, 1)} uint8 as TFDS gives them; all zero the mask of what has none."""

    def __init__(self, found: Found):
        self.pairs = [(file, found.masks.get(id)) for id, file in found.images.items()]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, mask = self.pairs[i]
        pixels = inputs.pixels(image)
        outline = common.read_mask(mask, pixels.shape[1::-1]) if mask else np.zeros((1, 1), np.uint8)
        return {"image": pixels, "mask": outline[..., None]}


class Joined(Sequence):
    """The rows of one source after those of another."""

    def __init__(self, *sources):
        self.sources = sources

    def __len__(self):
        return sum(len(source) for source in self.sources)

    def __getitem__(self, i):
        for source in self.sources:
            if i < len(source):
                return source[i]
            i -= len(source)
        raise IndexError(i)


def held_out(id: str, share: float) -> bool:
    """Whether an outlined image is measured on instead of trained on: SHA-256("folder/test/<id>") as a fraction < share.

    A function of the id alone: an image stays on its side when others come or go.
    """
    return int(hashlib.sha256(f"folder/test/{id}".encode()).hexdigest(), 16) < share * 2**256


def pairs(images, masks) -> dict[str, tuple[File, File]]:
    """id -> (image, outline) of the outlined images, by name only; nothing is decoded."""
    found, outlines = _listed(images, "images")[0], _listed(masks, "masks")[0]
    alone = [id for id in found if len(found[id]) == len(outlines.get(id, [])) == 1]
    return {id: (found[id][0], outlines[id][0]) for id in alone}


def id_of(name: str, *, outline: bool = False) -> str:
    """The id of a file: its name without folders and extension, that of an outline without SUFFIXES too."""
    stem = pathlib.Path(name).stem
    for suffix in SUFFIXES if outline else ():
        stem = stem.removesuffix(suffix)
    return stem


def check(images, masks=None, *, key: str = "images", threads: int = 4, refuse: Callable | None = None) -> Found:
    """Everything in the folder `images`, which configuration key `key` names, and in `masks`; each is read and decoded once.

    Files are paired by name without extension, the outline's with or without SUFFIXES. refuse(id, pixels): called with each
    image, uint8 (h, w, 3), on one of the threads; a text that it returns is a reason to leave the image out, counted in the
    notes. Raises UserError where there is no folder or no image.
    """
    found, ignored = _listed(images, key)
    outlines, more = _listed(masks, "masks") if masks else ({}, [])
    wrong, sizes, left_out, sha256 = {}, {}, collections.Counter(), {}
    for files in (found, outlines):
        for id in [id for id, same in files.items() if len(same) > 1]:
            names = [str(file) for file in files.pop(id)]
            wrong |= dict.fromkeys(names, f"{', '.join(names)} are all {id}: keep one")
    for id in outlines.keys() - found.keys():
        wrong[str(outlines[id][0])] = f"{outlines[id][0]} has no image of its name"

    def decoded(id):
        try:
            read = {file: file.read() for file in [found[id][0], *outlines.get(id, [])]}
            sha256.update({file: hashlib.sha256(content).hexdigest() for file, content in read.items()})
            pixels, mask = inputs.pixels(found[id][0], read[found[id][0]]), None
            reason = refuse(id, pixels) if refuse else None
            if id in outlines:
                mask = common.read_mask(outlines[id][0], pixels.shape[1::-1], content=read[outlines[id][0]])
            return pixels.shape[1::-1], reason, "" if mask is None else looks(mask)
        except DataError as error:
            return error

    odd = collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for id, result in zip(found, pool.map(decoded, found), strict=True):
            if isinstance(result, DataError):
                wrong[str(found[id][0])] = str(result)
            elif result[1]:
                left_out[result[1]] += 1
            else:
                sizes[id] = result[0]
                odd[result[2]].append(id)
    sound = {id: found[id][0] for id in found if id in sizes}
    if not sound and not left_out:
        raise UserError(f"{images}: no image can be used" + (f", e.g. {next(iter(wrong.values()))}" if wrong else ""))
    paired = {id: outlines[id][0] for id in sound if id in outlines}
    notes = [f"{images}: {len(sound)} images{_between(sizes.values())}"]
    if masks:
        notes.append(f"{masks}: {len(paired)} outlines of them, {len(sound) - len(paired)} images without")
    notes += [f"left out: {count} {reason}" for reason, count in left_out.items()]
    if ignored := ignored + more:
        notes.append(f"ignored: {len(ignored)} files that are no images, as {ignored[0]}")
    for look_of, ids in odd.items():
        if look_of:
            notes.append(f"{look_of}: {', '.join(ids[:SHOWN])} ({len(ids)} in all)")
    reasons = sorted(set(wrong.values()))
    notes += [f"wrong: {why}" for why in reasons[:SHOWN]]
    if len(reasons) > SHOWN:
        notes.append(f"wrong: {len(reasons) - SHOWN} more")
    return Found(sound, paired, wrong, notes, sha256)


def looks(mask: np.ndarray) -> str:
    """What is odd about an outline (h, w), "" where nothing is."""
    if not mask.any():
        return "nothing is outlined in"
    return "the rim is lesion, which must be white and skin black, in" if common.looks_inverted(mask) else ""


def _listed(path, key: str) -> tuple[dict[str, list[File]], list[str]]:
    """({id: its files}, sorted; names of what is no image) of a folder or zip."""
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise UserError(f"config key {key}={path}: no such folder (where a path holds a comma: --config.files.{key}=DIR)")
    found, ignored = collections.defaultdict(list), []
    for file in common.Source(path, links=True).files():
        if not inputs.is_image(file.name) or key != "masks" and inputs.NO_IMAGE.search(file.name):
            ignored.append(str(file))
            continue
        found[id_of(file.name, outline=key == "masks")].append(file)
    if not found:
        raise UserError(f"config key {key}={path}: no images there ({', '.join(inputs.IMAGES)})")
    return dict(sorted(found.items())), ignored


def _between(sizes) -> str:
    """", 640x480 to 3072x2304 pixels" of (w, h) pairs."""
    if not sizes:
        return ""
    small, large = min(sizes, key=np.prod), max(sizes, key=np.prod)
    return f", {small[0]}x{small[1]}" + (f" to {large[0]}x{large[1]}" if small != large else "") + " pixels"
