"""One run, one folder: claimed while it is written to."""

import contextlib
import fcntl
import pathlib

from mira_u_jax.errors import UserError


@contextlib.contextmanager
def claimed(workdir):
    """Hold DIR/.lock; the kernel frees it when the process dies, however it dies.

    Raises UserError where another run holds it, and where the folder cannot be made or written to.
    """
    path = pathlib.Path(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({error.strerror}); give another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--workdir={workdir}: another run is writing there; wait for it or give another folder"
            ) from None
        yield
