"""Train MIRA-U and measure it: masked image modelling, semi-supervised training, evaluation.

    python -m mira_u_jax.main --config=configs/isic.py:frac=0.25 [--workdir=DIR] [--config.key=value ...]

--seeds=R runs the seeds seed, seed + 1, ... in DIR/seed<k>, on as many devices at once as there are.
The same command again goes on where the last one stopped. DIR (default runs/<name>-<hash of the config>) then holds
config.json, metrics.jsonl, checkpoints/, figures/ and evaluation.json. On several machines: docs/clusters.md.
"""

import contextlib
import pathlib
import sys

from mira_u_jax import memory

if __name__ == "__main__":
    memory.with_huge_pages("mira_u_jax.main")  # before anything heavy is imported

from absl import flags
from ml_collections import config_flags

from mira_u_jax import cluster, command, config, evaluate, replicates, sharding, train
from mira_u_jax.errors import UserError
from mira_u_jax.workdir import claimed

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE:key=value,... as configs/isic.py:frac=0.25.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; default runs/<name>-<hash of the config>.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Run so many seeds, a process each, in DIR/seed<k>.", lower_bound=1)

COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes make one run.")
CLUSTER = flags.DEFINE_bool("cluster", False, "Join the other processes that JAX finds by itself, as on a TPU pod.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes make the run.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)
TIMEOUT = flags.DEFINE_integer("cluster_timeout", 100, "Seconds after which a silent process counts as lost.", lower_bound=5)


def main():
    for name in ("preset", "method", "ablate"):
        if name in config_flags.get_override_values(flags.FLAGS["config"]):
            raise UserError(f"--config.{name} comes too late to set what it stands for: write --config=FILE:{name}=...")
    resolved = config.check(CONFIG.value)
    workdir = pathlib.Path(WORKDIR.value or f"runs/{resolved.name}-{config.fingerprint(resolved)}")
    if SEEDS.value > 1:
        if PROCESSES.value:
            raise UserError("--seeds: each seed is a process of its own, so leave --processes out")
        sys.exit(replicates.run(sys.argv[1:], workdir, range(resolved.seed, resolved.seed + SEEDS.value)))
    if PROCESSES.value is None and not (CLUSTER.value or cluster.launched()):
        sharding.use_cores(resolved)
    cluster.join(COORDINATOR.value, PROCESSES.value, PROCESS.value, found=CLUSTER.value, timeout=TIMEOUT.value)
    cluster.say(f"workdir {workdir}")
    with claimed(workdir) if cluster.first() else contextlib.nullcontext():
        if cluster.first():
            evaluate.find_images(resolved)
        train.run(resolved, workdir)
        if cluster.first():
            evaluate.finish(workdir)


if __name__ == "__main__":
    command.run(main, required=("config",))
