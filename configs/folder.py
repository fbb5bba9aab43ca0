"""Images of your own, with outlines for some of them: those are the labelled ones, all others are unlabelled.

    python -m mira_u_jax.main --config=configs/folder.py:images=DIR,masks=DIR,preset=cpu
    python -m mira_u_jax.main --config=configs/folder.py:images=DIR,masks=DIR,holdout=0,skip=1

An outline has the name of its image, with or without _Segmentation or _mask, and its size; lesion is 255 or 1. The folders
are looked through first: what they hold is printed, and what is wrong with which file. holdout: the share of the outlined
images, chosen by a hash of the name, that is not trained on but measured on (0.2; 0 measures nothing). frac: the share of
the other outlines that is used (1). skip=1 goes on without the wrong files. init=RUN starts from the weights of a run, as
one on ISIC-2016. The other keys are those of configs/isic.py, but split and extra. A path with a comma goes to
--config.files.images=DIR. docs/usage.md says more.

Hardware: as configs/isic.py; preset=cpu is for two CPU cores.
"""

from configs import common

KEYS = {"images": str, "masks": str, "holdout": float, "skip": int}


def get_config(arg=None):
    return common.get_config(arg, keys=KEYS, name="folder", dataset="folder", test="folder", frac=1.0)
