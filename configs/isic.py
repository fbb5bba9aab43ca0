"""ISIC-2016 Part 1: 900 training images, 379 test images; `frac` of the training outlines are used.

    python -m mira_u_jax.main --config=configs/isic.py:frac=0.25
    python -m mira_u_jax.main --config=configs/isic.py:frac=0.1,preset=cpu,split=dev

Keys: frac (0, 1], label_seed 0..7, seed, size (a multiple of 32), preset smoke | quick | cpu | cpu128 | paper | full,
method mira_u | supervised | mean_teacher | ua_mt | fixmatch | unimatch | cross_teaching | udamt, ablate no_uncertainty |
no_mim | cnn_only | no_entropy | hard_label | paper_label | one_geometry | grey_mim | alg1 | T1 | T2 | T3 | T4, teacher
both | vit | ema, pseudo_label mu | hard | paper, batch, split test | dev, data_dir; init, the folder of a run to start from;
extra, a folder of more images without outlines, and skip 1, which goes on without the wrong ones of them (docs/usage.md).
What each name switches: docs/paper.md, section 5. Any other leaf: --config.loss.gamma=0.02.

preset=cpu: 64 px, 11 to 41 minutes of one CPU core; with frac=0.1,split=dev it reaches Dice .904 on the development images
of a 256 px copy, method=supervised .896 (docs/results.md). preset=full and paper: 256 px, one accelerator; not trained
so far for want of one.
"""

from configs import common


def get_config(arg=None):
    return common.get_config(arg, keys={"extra": str, "skip": int}, name="isic", dataset="isic2016", test="isic2016")
