"""The configuration all files here start from: the tree, the presets, the methods and the ablations.

Order: tree -> preset -> method -> ablation -> keys after the colon -> --config.key=value on the command line.
"""

import ml_collections
from ml_collections import config_dict

from mira_u_jax.config import check_value, parse_arg, update
from mira_u_jax.errors import UserError

KEYS = {  # after the colon, in every file here -> type
    "frac": float, "label_seed": int, "seed": int, "size": int, "preset": str, "method": str, "ablate": str, "teacher": str,
    "pseudo_label": str, "batch": int, "split": str, "data_dir": str, "init": str,
}
SHORT = {  # keys that are leaves
    "teacher": "teacher.source", "pseudo_label": "pseudo.label", "batch": "train.batch", "images": "files.images",
    "masks": "files.masks", "holdout": "files.holdout", "extra": "files.extra", "skip": "files.skip",
    "init": "files.init",
}


def either(value):
    """A leaf that --config.key=... may set to a number or to a text, as 1500 or "200 epochs"."""
    return config_dict.FieldReference(value, field_type=object)


def tree() -> ml_collections.ConfigDict:
    """Every key with its default, the preset `full`."""
    c = ml_collections.ConfigDict()
    c.name = "isic"  # of the default workdir
    c.dataset = "isic2016"  # what is trained on: isic2016 | ph2 | synthetic_lesions | folder
    c.test = "isic2016"  # what split=test is measured on
    c.data_dir = ""  # "" is TFDS's default, ~/tensorflow_datasets or $TFDS_DATA_DIR
    c.data = dict(  # how it reaches the device
        stream="auto",  # true: read batch by batch; false: resident; auto: resident up to limit_gb
        limit_gb=4.0, threads=4,
    )
    c.files = dict(  # of your own; docs/usage.md
        images="", masks="",  # dataset=folder: folders, outlines of some images
        holdout=0.2,  # share of the outlined images that is measured on, by a hash of the name
        extra="",  # isic2016: a folder of more images without outlines
        init="",  # the folder of a run whose averages this one starts from
        skip=0,  # 1 goes on without files that are wrong
    )
    c.split = "test"  # dev: choices are made on a fifth of the training images, see docs/data.md
    c.fold = -1  # ph2 only: train on the other four folds and test on this one; -1 is no folds
    c.preset, c.method, c.ablate = "full", "mira_u", ""
    c.frac = 0.25  # share of the official training images whose outlines are used
    c.label_seed = 0  # which outlines: column of label_rank
    c.seed = 0  # initial weights, data order, dropout, augmentation
    c.size = 256  # images are squashed to size x size
    c.student = dict(
        widths=(32, 64, 128, 256, 256), stages=("conv", "conv", "conv", "conv", "swin"),
        skips=("gate", "gate", "cross", "cross"), window=8, head_width=32, mlp_ratio=4, dropout=0.1, outputs=1,
    )
    c.vit = dict(patch=8, channels=256, depth=4, heads=4, hidden=512, head_widths=(16, 32, 64), dropout=0.1)
    c.mim = dict(
        steps=either(5_000), batch=32, target="both", ratio=0.75, lr=1e-3, grey=False,
        joint_weight=0.0,  # of L_MIM inside the semi-supervised step
        decoder=dict(channels=128, depth=2, heads=4),
    )
    c.train = dict(
        steps=either(20_000), batch=16,  # `batch` labelled and as many unlabelled images a step
        log_every=either(50), save_every=either("5%"), figures_every=either("20%"),
        keep=2,  # checkpoints: an older one for the day when the newest is damaged
        # bfloat16: products and activations; parameters, sums of norms and softmax, logits, losses, EMA stay float32
        precision="float32",
    )
    c.mesh = dict(
        cpu_devices=either("auto"),  # of one process on a CPU: a core each, as far as they divide the batches; or a number
        fsdp=False,  # true: parameters, averages and moments are spread over the devices
    )
    c.optim = dict(
        lr=1e-3, weight_decay=0.05, clip=1.0, warmup=0.05, schedule="cosine",
        # schedule=plateau: a share of the LABELLED images validates; patience counts validations
        plateau=dict(every=either("1 epoch"), factor=0.5, patience=10, cooldown=0, min_scale=0.01, holdout=0.2),
    )
    c.ema = dict(alpha=0.999, every=either(1))  # `every`: steps, or "1 epoch"
    c.teacher = dict(
        source="both", weights="ema", passes=8, dropout=True,
        chunk=0,  # passes of a network at a time: fewer need less memory and more time; 0 is all at once
    )
    c.pseudo = dict(label="mu", weight="confidence", filter="sigma", kappa=0.1, tau_u=0.15, tau_p=0.95)
    c.loss = dict(
        lambda_dice=0.5, lambda_bce=0.5, lambda_u=1.0, lambda_c=0.1, distance="cross_entropy", norm="weights",
        wait=0.0, ramp=0.4,  # shares of the steps: labels alone, then beta(t) rises to `beta`
        beta=1.0, gamma=0.01, feature=0.0,  # `feature`: share of L_unsup from a view whose features are perturbed
    )
    c.augment = dict(
        geometry=dict(flip=True, rotate=180.0, scale=0.25, shift=0.1),
        upright=True,  # the teacher sees an image before it is turned, and its answer is turned; False: it sees it turned
        labelled_colour=0.5, weak_colour=0.2, strong_views=1, strong_ops=2, strong_magnitude=9.0,
        cutout=0.15, cutmix=0.5,
    )
    c.evaluation = dict(  # of every method alike
        passes=8,  # dropout passes behind its sigma and its calibrated p
        flips=False,  # masks from the mean over the four flips of an image
        largest=False,  # a mask is its largest connected part: a photograph shows one lesion
    )
    return c


NARROW = {
    "student.widths": (16, 32, 64, 128, 128), "student.mlp_ratio": 2,
    "vit.channels": 128, "vit.hidden": 256, "vit.heads": 4,
    "mim.decoder.channels": 64, "mim.decoder.depth": 1, "mim.decoder.heads": 2,
}

PRESETS: dict[str, dict] = {
    # each stage a few steps: seconds, to see that everything runs
    "smoke": NARROW | {
        "size": 32, "student.widths": (8, 8, 16, 16, 16), "student.head_width": 8, "vit.channels": 32, "vit.depth": 1,
        "vit.hidden": 64, "vit.patch": 4, "vit.head_widths": (16, 16), "mim.decoder.channels": 32, "mim.steps": 4,
        "mim.batch": 4, "train.steps": 6, "train.batch": 4, "train.log_every": 2, "train.save_every": 3,
        "train.figures_every": 3, "teacher.passes": 4, "evaluation.passes": 2,
    },
    # 64 px on two CPU cores, minutes
    "cpu": NARROW | {
        "size": 64, "mim.steps": 400, "mim.batch": 16, "train.steps": 1_500, "train.batch": 8,
        "teacher.passes": 4, "ema.alpha": 0.99,
    },
    # `make run`: the same in a few minutes. So short a run hears its teacher later: at 40% of the steps it knows little.
    "quick": NARROW | {
        "size": 64, "mim.steps": 100, "mim.batch": 16, "train.steps": 600, "train.batch": 8,
        "teacher.passes": 4, "ema.alpha": 0.98, "loss.ramp": 1.0,
    },
    "cpu128": NARROW | {
        "size": 128, "mim.steps": 400, "mim.batch": 16, "train.steps": 3_000, "train.batch": 8,
        "teacher.passes": 4, "ema.alpha": 0.99,
    },
    # what section 3.4 says: 200 epochs, batch 8, AdamW 1e-3, plateau, M = 8; what it leaves open is as in `full`
    "paper": {
        "train.steps": "200 epochs", "train.batch": 8, "mim.steps": "50 epochs", "mim.batch": 8,
        "optim.schedule": "plateau", "ema.alpha": 0.99,
    },
    # 256 px, for an accelerator; not trained so far
    "full": {},
}

# What the consistency baselines have in common: the student alone; one deterministic pass, so that sigma = 0 and w = 1;
# of the losses Eq. (7) and the first term of Eq. (8).
STUDENT_ONLY = {"teacher.source": "ema", "mim.steps": 0}
ONE_TERM = {"loss.lambda_c": 0.0, "loss.gamma": 0.0}
ONE_PASS = ONE_TERM | {"teacher.passes": 1, "teacher.dropout": False, "pseudo.filter": "none"}
# Sohn et al. 2020: the student's own hard labels where it is more than tau_p sure, over all pixels, from the first step.
FIXMATCH = STUDENT_ONLY | ONE_PASS | {
    "teacher.weights": "online", "pseudo.label": "hard", "pseudo.filter": "probability", "loss.norm": "pixels",
    "loss.ramp": 0.0,
}

METHODS: dict[str, dict] = {
    "mira_u": {},
    # Eq. (7) alone. No unlabelled image is read, so no masked image modelling either.
    "supervised": {"loss.beta": 0.0, "mim.steps": 0},
    # Tarvainen & Valpola 2017, with our augmentation and CutMix: one pass of the student's average.
    "mean_teacher": STUDENT_ONLY | ONE_PASS,
    # Yu et al. 2019: the mean of M passes of the average where its entropy is low, squared distance, weight .1.
    "ua_mt": STUDENT_ONLY | ONE_TERM | {
        "pseudo.weight": "none", "pseudo.filter": "entropy", "loss.distance": "squared", "loss.beta": 0.1,
    },
    "fixmatch": FIXMATCH,
    # Yang et al. 2023: FixMatch with two strong views and a weak one whose features are perturbed.
    "unimatch": FIXMATCH | {"augment.strong_views": 2, "loss.feature": 0.5},
    # Luo et al. 2022: the student learns from the ViT's hard labels and the ViT from the student's, weight .1.
    "cross_teaching": ONE_PASS | {
        "teacher.source": "cross", "teacher.weights": "online", "pseudo.label": "hard", "loss.beta": 0.1, "mim.steps": 0,
    },
    # Zou et al. 2025: labels alone first; then the average's two heads teach where they differ by less than .2, which
    # is sigma < .2 / sqrt 2 for the deviation of two values.
    "udamt": STUDENT_ONLY | ONE_PASS | {
        "student.outputs": 2, "pseudo.weight": "none", "pseudo.filter": "sigma", "pseudo.tau_u": 0.2 / 2**0.5,
        "loss.wait": 0.2,
    },
}

ABLATIONS: dict[str, dict] = {
    # Table 5
    "no_uncertainty": {"pseudo.weight": "none", "pseudo.filter": "none"},
    "no_mim": {"mim.steps": 0},
    "cnn_only": {"student.stages": ("conv",) * 5, "student.skips": ("gate",) * 4},
    "no_entropy": {"loss.gamma": 0.0},
    # other readings of the text
    "hard_label": {"pseudo.label": "hard"},
    "one_geometry": {"augment.upright": False},  # weak and strong views alike turned, zoomed and shifted
    "paper_label": {"pseudo.label": "paper"},  # w mu, Algorithm 2 line 8
    "grey_mim": {"mim.grey": True},  # the "discarding of chromatic components" that section 3.1.1 decides against
    # The sum of Algorithm 1, L_MIM + L_cons + L_ent in one loop: no labels, one pass of the ViT, phi once an epoch. It
    # cannot learn what a lesion is; it is here to be looked at.
    "alg1": {
        "mim.steps": 0, "mim.joint_weight": 1.0, "mim.target": "vit", "teacher.source": "vit", "teacher.passes": 1,
        "teacher.dropout": False, "pseudo.filter": "none", "loss.lambda_dice": 0.0, "loss.lambda_bce": 0.0,
        "loss.lambda_c": 0.0, "loss.ramp": 0.0, "loss.gamma": 1.0, "augment.cutmix": 0.0, "ema.every": "1 epoch",
    },
    # Table 1: the passes are all that it says of its teachers; T1 is mira_u itself where a preset has M = 8
    "T1": {"teacher.passes": 8}, "T2": {"teacher.passes": 12}, "T3": {"teacher.passes": 16}, "T4": {"teacher.passes": 20},
}


def get_config(arg: str | None, *, keys=None, **fixed) -> ml_collections.ConfigDict:
    """The configuration for `--config=FILE:arg`. `fixed`: dotted keys a file sets; `keys`: its keys beyond KEYS.

    Raises UserError, one line that names the key and its allowed values.
    """
    given = parse_arg(arg, KEYS | (keys or {}))
    c = tree()
    preset = given.pop("preset", fixed.pop("preset", "full"))
    method, ablate = given.pop("method", "mira_u"), given.pop("ablate", "")
    leaves = {leaf: given.pop(key) for key, leaf in SHORT.items() if key in given}
    for key, value, table in (("preset", preset, PRESETS), ("method", method, METHODS), ("ablate", ablate, ABLATIONS)):
        if value not in table and not (key == "ablate" and value == ""):
            raise UserError(f"config key {key}={value!r}: it must be one of {', '.join(table)}")
    for key, used in (("ablate", ablate), *((key, SHORT[key] in leaves) for key in ("teacher", "pseudo_label"))):
        if used and method != "mira_u":
            raise UserError(f"config key {key}: it changes method=mira_u only, not {method}")
    for leaf, value in leaves.items():
        check_value(leaf, value)
    for changes in (PRESETS[preset], fixed, METHODS[method], ABLATIONS[ablate] if ablate else {}, given, leaves):
        update(c, changes)
    update(c, {"preset": preset, "method": method, "ablate": ablate})
    return c
