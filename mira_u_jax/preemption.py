"""Being told to leave: SIGTERM, as a scheduler sends it before it takes the machine."""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

ASKED = itertools.count(1)  # never falls from one stage to the next, as JAX's service wants


class Notice:
    """with Notice() as leave: ... leave() after each step: whether to save and go. All processes answer alike.

    One process: a handler sets a flag, so that a step is never cut in two. Several: JAX's preemption service, which hears
    the signal of any process and names one step at which all of them answer True; every process must ask once a step.
    """

    def __enter__(self):
        self.told, self.before = False, None
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self.hear)
        return self

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def hear(self, *_):
        self.told = True

    def __call__(self) -> bool:
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(next(ASKED))
        return self.told
