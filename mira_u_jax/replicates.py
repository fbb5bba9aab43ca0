"""The same run with several seeds: a process each, on a device each where there are several."""

import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

FORCED = r"--xla_force_host_platform_device_count=\d+"
# What makes one device of several visible. A CPU has several only where they are forced, else a run has all of its cores.
# The TPU's is as its documentation says and has not been tried.
VISIBLE = {
    "gpu": lambda i: {"CUDA_VISIBLE_DEVICES": i},
    "tpu": lambda i: {"TPU_VISIBLE_CHIPS": i, "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"},
    "cpu": lambda i: {
        "XLA_FLAGS": re.sub(FORCED, f"{FORCED[:-3]}1", os.environ.get("XLA_FLAGS", "")),
        **({"JAX_NUM_CPU_DEVICES": "1"} if "JAX_NUM_CPU_DEVICES" in os.environ else {}),
    },
}


def devices() -> tuple[str, list[str]]:
    """("gpu", names of the devices that JAX sees); asked in a process of its own, as whoever asks takes their memory."""
    ask = "import jax; print(jax.default_backend(), jax.local_device_count())"
    kind, count = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True).stdout.split()[-2:]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return kind, visible.split(",") if kind == "gpu" and visible else [str(i) for i in range(int(count))]


def run(argv: list[str], workdir, seeds) -> int:
    """Run main with the arguments `argv` once a seed, in workdir/seed<k>; the highest exit status.

    Each is what main gives with that seed on one device. As many at once as there are devices; a SIGTERM is handed on.
    """
    kind, names = devices()
    free, started = queue.SimpleQueue(), []
    for name in names:
        free.put(name)

    def one(seed) -> int:
        device = free.get()
        command = [sys.executable, "-m", "mira_u_jax.main", *argv, "--seeds=1", f"--config.seed={seed}"]
        command.append(f"--workdir={pathlib.Path(workdir) / f'seed{seed}'}")
        try:
            print(f"seed {seed} on {kind} {device}", flush=True)
            process = subprocess.Popen(command, env=os.environ | VISIBLE[kind](device))
            started.append(process)
            return status_of(process.wait())
        finally:
            free.put(device)

    def leave(*_):
        seeds.clear()
        for process in started:
            process.terminate()

    seeds, before = list(seeds), signal.signal(signal.SIGTERM, leave)
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            done = [pool.submit(lambda: one(seeds.pop(0)) if seeds else 143) for _ in list(seeds)]
            try:
                return max(job.result() for job in done)
            except KeyboardInterrupt:  # the processes heard it too; no other may begin
                seeds.clear()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(code: int) -> int:
    """The exit status of a process as a shell reports it."""
    return code if code >= 0 else 128 - code
