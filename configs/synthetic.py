"""The embedded procedural data set, 400 training and 100 test images: no download, no licence. `make run` runs this.

    python -m mira_u_jax.main --config=configs/synthetic.py --workdir=runs/quickstart

Keys: those of configs/isic.py but extra and skip; preset=quick unless another is named. Two CPU cores, minutes; what it
reaches stands in README.md and docs/results.md. The figures say that everything works; they say nothing about skin.
"""

from configs import common


def get_config(arg=None):
    return common.get_config(
        arg, name="synthetic", dataset="synthetic_lesions", test="synthetic_lesions", preset="quick"
    )
