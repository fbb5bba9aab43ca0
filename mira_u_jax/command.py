"""What every command shares: flags, one-line errors, the compilation cache."""

import logging
import os
import pathlib
import sys
import threading

import jax
from absl import flags

from mira_u_jax import cluster
from mira_u_jax.errors import UserError, exit_status

flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def run(body, *, required: tuple[str, ...] = (), rest: str = ""):
    """Parse the command line, call body() and exit with its status (errors.py).

    required: flags that must be given; rest: the flag of several values that also takes what follows without a flag.
    """
    argv, debug = sys.argv, bool({"--debug", "-debug", "--debug=true", "--debug=True"} & set(sys.argv))

    def checked():
        try:
            flags.FLAGS.set_gnu_getopt(bool(rest))  # flags may follow what is not one
            words = flags.FLAGS(argv)[1:]
            missing = [name for name in required if getattr(flags.FLAGS, name) is None]
            if "config" in required and not missing:
                flags.FLAGS.config["name"]  # a file that could not be loaded raises only when it is read
        except Exception as error:  # absl and ml_collections raise a dozen kinds for a wrong flag, file, key or value
            raise plain(error) from error
        if rest and getattr(flags.FLAGS, rest):
            setattr(flags.FLAGS, rest, [*getattr(flags.FLAGS, rest), *words])
        elif words:
            raise UserError(f"argument {words[0]!r} is not a flag (see --help)")
        if missing:
            raise UserError(f"--{missing[0]} is required (see --help)")
        set_up()
        body()

    if {"--help", "-h", "-help"} & set(argv):
        print((sys.modules["__main__"].__doc__ or "").strip() + "\n" + flags.FLAGS.main_module_help())
        sys.exit(0)
    if not debug:  # orbax's threads raise in the main one too, where it becomes a line
        threading.excepthook = lambda _: None
        sys.unraisablehook = lambda _: None
    status = exit_status(checked, debug=debug)
    cluster.leave(status)
    sys.exit(status)


def plain(error: Exception) -> UserError:
    """What flag parsing raised, as one line: our own message where a configuration file raised it, else the last cause."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    ours = [e for e in chain if isinstance(e, UserError)]
    if ours:
        return ours[-1]  # the first raised; config_flags raises the same kind again with the traceback as its text
    file = next((a.partition("=")[2].partition(":")[0] for a in sys.argv if a.startswith("--config=")), "")
    if isinstance(error, OSError):
        return UserError(f"--config: {file!r} cannot be read; give one of configs/ (run from the project's folder)")
    text = str(error.args[0] if error.args else error).replace("\\n", ". ").replace("\\'", "'").replace("'", "")
    if isinstance(error, (AttributeError, KeyError)):
        return UserError(f"{file} has no config key {text} (see --help)")
    return UserError(f"{text.splitlines()[-1].strip()} (see --help)")


def set_up():
    """Keep compiled programs between runs (MIRA_U_CACHE names the folder), and libraries quiet."""
    cache = os.environ.get("MIRA_U_CACHE") or pathlib.Path.home() / ".cache" / "mira_u_jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
