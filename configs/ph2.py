"""PH2, 200 images. Bare: Table 3 of the paper, train on ISIC-2016 and test on all of PH2.

    python -m mira_u_jax.main --config=configs/ph2.py:frac=0.5
    python -m mira_u_jax.main --config=configs/ph2.py:fold=0    # in-domain: train on four folds, test on fold 0

Keys: those of configs/isic.py but extra and skip, and fold 0..4. In-domain figures are not comparable with cross-dataset
ones. With split=dev the run is measured on the development images of the set it trains on; PH2's folds have none.
Hardware: as configs/isic.py. What it reaches was only measured on a sample of 20 images, with networks of 64 px
(docs/results.md).
"""

from configs import common


def get_config(arg=None):
    c = common.get_config(arg, keys={"fold": int}, name="ph2", dataset="isic2016", test="ph2")
    if c.fold >= 0:
        c.dataset = "ph2"
    return c
