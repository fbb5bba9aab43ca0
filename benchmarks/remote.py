"""A framework in a process of its own that works only when asked, so that two thread pools never share the cores."""

import importlib
import multiprocessing
import os
import resource
import time
import traceback
from unittest import mock

from mira_u_jax import memory


class RemoteError(RuntimeError):
    """The other side raised, or its process ended; the text says what."""


class Remote:
    """An object of class MODULE:CLASS in a fresh process: remote("method", *args) calls it there and waits.

    environ: variables set there before the module, and with it the framework, is imported. Huge pages for all, as in our
    runs.
    """

    def __init__(self, target: str, *args, environ=None, **kwargs):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, target, args, kwargs, environ or {}), daemon=True)
        with mock.patch.dict(os.environ, memory.HUGE_PAGES | os.environ):  # it hears of them when it starts
            self.process.start()
        theirs.close()
        self.result()  # the constructor's

    def __call__(self, method: str, *args, timeout: float | None = None, **kwargs):
        try:
            self.pipe.send((method, args, kwargs))
        except OSError:  # it ended in an earlier call
            raise self.ended() from None
        return self.result(timeout)

    def result(self, timeout: float | None = None):
        """What the call returned; RemoteError when it raised, died, or took over `timeout` seconds, which kills it."""
        try:
            if timeout is not None and not self.pipe.poll(timeout):
                self.process.kill()
                raise RemoteError(f"no answer after {timeout:.0f} s")
            done, value = self.pipe.recv()
        except (EOFError, OSError):
            raise self.ended() from None
        if not done:
            raise RemoteError(value)
        return value

    def ended(self) -> RemoteError:
        self.process.join(10)
        return RemoteError(f"the process ended with status {self.process.exitcode}")

    def close(self):
        self.pipe.close()
        self.process.join(10)
        self.process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(pipe, target, args, kwargs, environ):
    """The process: build the object, then answer calls until the pipe closes."""
    os.environ.update(environ)
    module, name = target.split(":")
    call = lambda method, args, kwargs: getattr(served, method)(*args, **kwargs)  # noqa: E731
    try:
        try:
            served = getattr(importlib.import_module(module), name)(*args, **kwargs)
            pipe.send((True, None))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        while True:
            request = pipe.recv()
            try:
                pipe.send((True, call(*request)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass


def peak_memory() -> int:
    """Bytes of memory that this process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def median_seconds(call, *, seconds: float, least: int = 3) -> float:
    """Median time of call(), which waits for its own result, after one call that is not counted."""
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
