"""Train MIRA-U and measure it: masked image modelling, semi-supervised training, evaluation.

    python -m mira_u_jax.main --config=configs/isic.py:frac=0.25 [--workdir=DIR] [--config.key=value ...]

The same command again goes on where the last one stopped. DIR (default runs/<name>-<hash of the config>) then holds
config.json, metrics.jsonl, checkpoints/, figures/ and evaluation.json.
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from mira_u_jax import command, config, evaluate, train
from mira_u_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE:key=value,... as configs/isic.py:frac=0.25.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; default runs/<name>-<hash of the config>.")


def main():
    for name in ("preset", "method", "ablate"):
        if any(arg.startswith(f"--config.{name}") for arg in sys.argv):
            raise UserError(f"--config.{name} comes too late to set what it stands for: write --config=FILE:{name}=...")
    resolved = config.check(CONFIG.value)
    workdir = pathlib.Path(WORKDIR.value or f"runs/{resolved.name}-{config.fingerprint(resolved)}")
    print(f"workdir {workdir}", flush=True)
    train.run(resolved, workdir)
    evaluate.finish(workdir)


if __name__ == "__main__":
    command.run(main, required=("config",))
