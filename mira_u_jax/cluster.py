"""Several processes, one run: how they find each other, speak with one voice and end together.

    --coordinator=HOST:PORT --processes=N --process=I     by hand: N commands, HOST that of process 0
    srun ...                                              nothing to say: JAX reads it from the launcher
    --cluster                                             on every host of a TPU pod: JAX asks where the others are

One process needs none of this and gets none of it.
"""

import contextlib
import itertools
import os
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from mira_u_jax.errors import PREEMPTED, UserError


def join(coordinator: str | None, processes: int | None, process: int | None, *, found: bool = False, timeout: int):
    """Join the run's other processes if the arguments or the launcher speak of any. Before anything touches a device.

    found: whether to ask JAX for the others where no launcher that `launched` knows speaks of them.
    timeout: seconds after which one that does not come, or falls silent, counts as lost. Raises UserError for arguments
    that cannot be; ends the process when the others do not come.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(f"{missing[0]} is missing: several processes need --coordinator, --processes and --process")
    if not missing and process >= processes:
        raise UserError(f"--process={process}: it must be below --processes={processes}")
    if not missing and not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={coordinator}: it must be HOST:PORT")
    if missing and not (found or launched()):
        return
    patience = threading.Timer(timeout, alone, [timeout])
    patience.daemon = True
    patience.start()
    later = 4 * timeout + 60  # JAX ends every process by abort(); this is for when our own threads cannot
    jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=later, heartbeat_timeout_seconds=later
    )
    patience.cancel()
    threading.Thread(target=watch, daemon=True).start()
    threading.Thread(target=beat, args=(timeout,), daemon=True).start()


def alone(timeout: int):
    """End this process with a line: it has waited for the others long enough."""
    print(
        f"failed: the processes of this run did not all come within {timeout} s; look at the other processes, then start"
        " all of them again", file=sys.stderr, flush=True,
    )
    os._exit(1)


def launched() -> bool:
    """Whether a launcher that JAX knows started several of us: SLURM's srun, or the runtime of a TPU pod."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return tasks.isdigit() and int(tasks) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def say(text: str):
    if first():
        print(text, flush=True)


def meet(where: str):
    """Go on when every process has come here."""
    if jax.distributed.is_initialized():
        client().wait_at_barrier(where, timeout_in_ms=24 * 3600 * 1000)


QUESTIONS = itertools.count()  # a barrier's name serves once


def anywhere(flag) -> bool:
    """Whether `flag` is true in any process. All of them must ask, one question at a time."""
    if jax.process_count() == 1:
        return bool(flag)
    meet(f"question {next(QUESTIONS)}")  # by the coordinator, which waits as long as it takes; gloo gives up after 30 s
    return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


# --- the end ------------------------------------------------------------------------------------------------------------

FAILED, ALIVE = "mira_u/failed", "mira_u/alive"  # keys under which a failure is told, and that a process lives
LEAVING = threading.Event()


def client():
    from jax._src import distributed  # JAX's own key-value store; orbax takes it from there too

    return distributed.global_state.client


def leave(status: int):
    """End this process's part of the run. A failure is told to the others, which would wait for it otherwise."""
    if not jax.distributed.is_initialized():
        return
    if status in (0, PREEMPTED):
        meet("leave")
        LEAVING.set()
        jax.distributed.shutdown()
        return
    LEAVING.set()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        fail(f"{status} process {jax.process_index()} of this run has ended with status {status}, and says why")
        time.sleep(2 if first() else 0)  # process 0 keeps the store: let the others read
    finally:
        os._exit(status)  # no farewell: it would wait for those that cannot come


def fail(text: str):
    """Tell all processes "STATUS text", unless they have been told something already."""
    with contextlib.suppress(Exception):
        client().key_value_set(FAILED, text)


def watch():
    """In a thread: end this process with a line when another one has failed."""
    try:
        status, _, text = client().blocking_key_value_get(FAILED, 365 * 24 * 3600 * 1000).partition(" ")
    except Exception:  # noqa: BLE001 - the store is gone, and process 0 with it
        status, text = 1, "process 0 of this run is gone"
    if not LEAVING.is_set():
        LEAVING.set()
        print(f"failed: {text}; the same commands go on from the last checkpoint", file=sys.stderr, flush=True)
        time.sleep(2 if first() else 0)
        os._exit(int(status))


def beat(timeout: int):
    """In a thread: say that this process lives; process 0 listens, and fails the run when one falls silent.

    Silence is counted in beats, not in seconds, so that a machine that slept is not taken for dead.
    """
    silent, heard = dict.fromkeys(range(jax.process_count()), 0), {}
    for count in itertools.count():
        time.sleep(timeout / 10)
        if LEAVING.is_set():
            return
        with contextlib.suppress(Exception):  # `watch` hears it too when the store is gone
            client().key_value_set(f"{ALIVE}/{jax.process_index()}", str(count), allow_overwrite=True)
            if first():
                now = dict(client().key_value_dir_get(ALIVE))
                for process in silent:
                    key = f"{ALIVE}/{process}"
                    silent[process] = 0 if now.get(key) != heard.get(key) else silent[process] + 1
                heard = now
                lost = [process for process, beats in silent.items() if beats >= 10]
                if lost:
                    fail(f"1 process {lost[0]} of this run is gone")
