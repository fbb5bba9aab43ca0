"""Builds a data set: `python -m tfds_builders.build isic2016|ph2|synthetic_lesions [--manual_dir=DIR] ...`.

Exit status: 0 built or already there, 2 for what the caller got wrong, 1 for what broke; one line on stderr.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import tensorflow_datasets as tfds

from tfds_builders.common import CONFIGS, DataError

DATASETS = ("isic2016", "ph2", "synthetic_lesions")
CONFIG_NAMES = tuple(config.name for config in CONFIGS)
EXAMPLES = """examples:
  python -m tfds_builders.build synthetic_lesions
  python -m tfds_builders.build isic2016 --manual_dir=FOLDER_WITH_THE_FOUR_ZIPS --config=all
  python -m tfds_builders.build ph2 --manual_dir=FOLDER_THAT_HOLDS_PH2Dataset --data_dir=DIR"""
GROUPS = {"all": CONFIG_NAMES, "sized": tuple(config.name for config in CONFIGS if config.size)}


def prepare(
    name: str,
    *,
    config: str,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set that is ready to be read, building it on first use.

    Args:
      name: "isic2016", "ph2" or "synthetic_lesions".
      config: "original", "256px" or "128px".
      data_dir: where TFDS keeps its data sets; None for TFDS's own default.
      manual_dir: where the source files lie; None for <data_dir>/downloads/manual. Where the data set is built
        already, sources are compared with what it was built from only if this is given.
      progress: whether TFDS may show progress bars.

    Raises:
      DataError: an unknown name or config, or sources that are missing, damaged or other than before.
    """
    if name not in DATASETS:
        raise DataError(f"no data set {name!r}: one of {', '.join(DATASETS)}")
    if config not in CONFIG_NAMES:
        raise DataError(f"no config {config!r} of {name}: one of {', '.join(CONFIG_NAMES)}")
    if data_dir is not None:
        data_dir = Path(data_dir).expanduser()
        if data_dir.exists() and not data_dir.is_dir():
            raise DataError(f"data_dir {data_dir} is a file: give a folder")
    module = importlib.import_module(f"tfds_builders.{name}.{name}_dataset_builder")
    builder = module.Builder(data_dir=data_dir, config=config)
    if not progress:
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself there
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
        )
    return builder


def counts(builder: tfds.core.DatasetBuilder) -> str:
    """E.g. "783 of 900 train, 321 of 379 test images"."""
    official = builder.info.metadata["official"]
    return ", ".join(f"{builder.info.splits[s].num_examples} of {n} {s}" for s, n in official.items()) + " images"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")  # argparse would print the usage too


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _Parser(
        prog="python -m tfds_builders.build",
        description="Builds a TFDS data set, without TensorFlow.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--manual_dir", help="folder with the source files (default: <data_dir>/downloads/manual)")
    parser.add_argument("--data_dir", help="where TFDS keeps data sets (default: TFDS's own)")
    parser.add_argument(
        "--config", choices=(*CONFIG_NAMES, *GROUPS), default="sized", help="default: sized, which is 256px and 128px"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        for config in GROUPS.get(args.config, (args.config,)):
            builder = prepare(
                args.dataset,
                config=config,
                data_dir=args.data_dir,
                manual_dir=args.manual_dir,
                progress=sys.stderr.isatty(),
            )
            print(f"{args.dataset}/{config}: {counts(builder)} in {builder.data_dir}", flush=True)
    except Exception as e:
        if args.debug:
            raise
        if isinstance(e, (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError)) and e.filename:
            e = DataError(f"{e.filename}: {e.strerror}; give another path")
        text = " ".join(str(e).split())
        print(f"error: {text}" if isinstance(e, DataError) else f"error: {type(e).__name__}: {text}", file=sys.stderr)
        return 2 if isinstance(e, DataError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
