"""What every command shares: flags, one-line errors, the compilation cache."""

import logging
import os
import pathlib
import sys

import jax
from absl import flags

from mira_u_jax.errors import UserError, exit_status

flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def run(body, *, required: tuple[str, ...] = ()):
    """Parse the command line, call body() and exit with its status (errors.py). `required`: flags that must be given."""
    argv, debug = sys.argv, "--debug" in sys.argv

    def checked():
        try:
            rest = flags.FLAGS(argv)
        except UserError:
            raise
        except Exception as error:  # absl and ml_collections raise a dozen kinds for a wrong flag, key or value
            raise UserError(f"{error} (see --help)") from error
        if len(rest) > 1:
            raise UserError(f"argument {rest[1]!r} is not a flag (see --help)")
        for name in required:
            if flags.FLAGS[name].value is None:
                raise UserError(f"--{name} is required (see --help)")
        set_up()
        body()

    if {"--help", "-h", "-help"} & set(argv):
        print((sys.modules["__main__"].__doc__ or "").strip() + "\n" + flags.FLAGS.main_module_help())
        sys.exit(0)
    sys.exit(exit_status(checked, debug=debug))


def set_up():
    """Keep compiled programs between runs (MIRA_U_CACHE names the folder), and libraries quiet."""
    cache = os.environ.get("MIRA_U_CACHE") or pathlib.Path.home() / ".cache" / "mira_u_jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
