"""What a run has learned from, with outlines and without: kept in its folder, and left out of what it is measured on."""

import dataclasses
import hashlib
import json
import pathlib

from mira_u_jax import whole
from tfds_builders import common
from tfds_builders.isic2016 import isic2016_dataset_builder

FILE = "learned_from.json"


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of data sets by their ids, which are the archives', and files of one's own by the SHA-256 of their bytes."""

    ids: frozenset[str] = frozenset()
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # hash: name without extension

    def __or__(self, other: "Images") -> "Images":
        return Images(self.ids | other.ids, self.files | other.files)

    def hold_id(self, id: str) -> bool:
        """Whether an image of a data set is among them; a file of its name counts as it."""
        return id in self.ids or id in self.files.values()

    def hold_file(self, id: str, file: common.File) -> bool:
        """Whether a file is among them: as one of a data set by its name, as one's own by its bytes."""
        return id in self.ids or bool(self.files) and hashlib.sha256(file.read()).hexdigest() in self.files


NOTHING = Images()


def keep(workdir, images: Images):
    """Write DIR/learned_from.json."""
    kept = {"ids": sorted(images.ids), "files": images.files}
    whole.write(pathlib.Path(workdir) / FILE, json.dumps(kept, indent=1) + "\n")


def of(workdir, config) -> Images:
    """What the run in `workdir`, of this configuration, has learned from, and the runs that it began with.

    Of runs from before the file was written ISIC-2016's images alone are known; of others it says so.
    """
    try:
        kept = json.loads((pathlib.Path(workdir) / FILE).read_text())
    except FileNotFoundError:
        if config.dataset == "isic2016":
            pool = isic2016_dataset_builder.official_ids("train")
            return Images(frozenset(id for id in pool if config.split == "test" or not common.is_dev("isic2016", id)))
        print(f"{workdir} is of an earlier version: not known which images it was trained on", flush=True)
        return Images()
    return Images(frozenset(kept["ids"]), kept["files"])
