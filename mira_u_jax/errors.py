"""How a command ends: one line on stderr and a status that says whose turn it is."""

import sys
import traceback

from tfds_builders.common import DataError


class UserError(ValueError):
    """What the caller got wrong. The message is one line that names the key, value, path or file, and the remedy."""


class Preempted(Exception):
    """The run was told to leave and has saved. The message is one line that says how far it came."""


# What the system says of a path that cannot be what the caller gave it for: too late to ask, in most cases, before trying.
WRONG_PATH = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)

PREEMPTED = 143  # 128 + SIGTERM, what a shell reports of a process that SIGTERM ended


def exit_status(run, *, debug: bool = False) -> int:
    """Call run() and return 0; or print one line and return another status: docs/usage.md, "Exit status"."""
    try:
        run()
    except (UserError, DataError) as error:
        return report(error, 2, debug)
    except WRONG_PATH as error:
        path = error.filename2 or error.filename
        if not path:
            return report(error, 1, debug)
        return report(UserError(f"{path}: {error.strerror}; give another path"), 2, debug)
    except Preempted as leave:
        print(f"{leave}; the same command goes on from there", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - the door of the program
        return report(error, 1, debug)
    return 0


def report(error: Exception, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "error" if status == 2 else f"failed ({type(error).__name__})"
    print(f"{kind}: {text}" + ("" if debug or status == 2 else "  [--debug shows where]"), file=sys.stderr)
    return status
