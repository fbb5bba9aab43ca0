"""Reading, checking and keeping a configuration. What a person changes lives in configs/, not here."""

import hashlib
import json
import math
import pathlib
from typing import Any

import ml_collections

from mira_u_jax import whole
from mira_u_jax.errors import UserError

FILTERS = ("sigma", "probability", "entropy")
IMAGES = ("images", "masks", "extra")  # keys of `files` that name a folder of images
FOLDERS = (*IMAGES, "init")  # or one of a run
# Keys, and branches of keys, that change no result: where data and parameters lie, what is kept, what is computed at once.
TRANSPORT = (
    "data_dir", "data", "mesh", "train.keep", "train.log_every", "train.save_every", "train.figures_every", "teacher.chunk",
)

# Keys that older runs do not have, with the value that changes nothing: with it a run is the same as without the key.
LATER = {
    "train.precision": "float32", "teacher.chunk": 0, "evaluation.passes": 8, "evaluation.flips": False, "files.extra": "",
    "files.init": "", "augment.upright": False, "evaluation.largest": False,
}
RENAMED = {"student.heads": "student.outputs"}  # keys of older runs

# What a value must be: in words, and its test.
COUNT = ("an integer >= 1", lambda v: is_int(v) and v >= 1)
NOT_NEGATIVE = ("a number >= 0", lambda v: is_number(v) and v >= 0)
POSITIVE = ("a number > 0", lambda v: is_number(v) and v > 0)
SHARE = ("a number in [0, 1]", lambda v: is_number(v) and 0 <= v <= 1)
SHARE_BELOW_1 = ("a number in [0, 1)", lambda v: is_number(v) and 0 <= v < 1)
INNER_SHARE = ("a number in (0, 1)", lambda v: is_number(v) and 0 < v < 1)
COUNT_OR_0 = ("an integer >= 0", lambda v: is_int(v) and v >= 0)
FLAG = ("True or False", lambda v: isinstance(v, bool))
FOLDER = ("the path of a folder", lambda v: isinstance(v, str))
CHANNELS = ("a multiple of 4", lambda v: is_int(v) and v >= 4 and v % 4 == 0)
WIDTHS = ("multiples of 8", lambda v: are_widths(v))


def one_of(*values: str) -> tuple:
    return f"{', '.join(values[:-1])} or {values[-1]}", lambda v: v in values


# Key -> what is right. Used on `configs/isic.py:key=value` and again on the whole tree after --config.key=value.
NAMES = ("isic2016", "ph2", "synthetic_lesions", "folder")
RULES = {
    "dataset": one_of(*NAMES),
    "test": one_of(*NAMES),
    "frac": ("a number in (0, 1]", lambda v: is_number(v) and 0 < v <= 1),
    "label_seed": ("an integer 0..7", lambda v: is_int(v) and 0 <= v <= 7),
    "seed": ("an integer 0..2147483647", lambda v: is_int(v) and 0 <= v < 2**31),
    "size": ("a multiple of 32 from 32 to 1024", lambda v: is_int(v) and 32 <= v <= 1024 and v % 32 == 0),
    "split": one_of("dev", "test"),
    "data.stream": ("auto, true or false", lambda v: str(v).lower() in ("auto", "true", "false")),
    "data.limit_gb": NOT_NEGATIVE,
    "data.threads": COUNT,
    "mesh.cpu_devices": ("auto or an integer >= 1", lambda v: v == "auto" or is_int(v) and v >= 1),
    "files.images": FOLDER,
    "files.masks": FOLDER,
    "files.extra": FOLDER,
    "files.init": FOLDER,
    "files.holdout": SHARE_BELOW_1,
    "files.skip": ("0 or 1", lambda v: v in (0, 1)),
    "mesh.fsdp": FLAG,
    "train.keep": ("an integer >= 2, as the newest checkpoint may be damaged", lambda v: is_int(v) and v >= 2),
    "fold": ("-1 (all) or 0..4", lambda v: is_int(v) and -1 <= v <= 4),
    "teacher.source": one_of("both", "vit", "ema", "cross"),
    "teacher.weights": one_of("ema", "online"),
    "teacher.passes": COUNT,
    "teacher.chunk": ("0 (all passes at once) or an integer >= 1", lambda v: is_int(v) and v >= 0),
    "pseudo.kappa": POSITIVE,
    "pseudo.tau_u": POSITIVE,
    "pseudo.tau_p": ("a number in [0.5, 1)", lambda v: is_number(v) and 0.5 <= v < 1),
    "pseudo.weight": one_of("confidence", "none"),
    "pseudo.filter": ("none, or sigma, probability, entropy joined by +", lambda v: v == "none" or is_sum(v, FILTERS)),
    "pseudo.label": one_of("mu", "hard", "paper"),
    "loss.norm": one_of("weights", "pixels"),
    "loss.beta": NOT_NEGATIVE,
    "loss.gamma": NOT_NEGATIVE,
    "loss.ramp": SHARE,
    "loss.wait": SHARE_BELOW_1,
    "loss.feature": SHARE,
    "loss.distance": one_of("cross_entropy", "squared"),
    "ema.alpha": SHARE_BELOW_1,
    "mim.target": one_of("vit", "student", "both"),
    "mim.joint_weight": NOT_NEGATIVE,
    "mim.grey": FLAG,
    "mim.ratio": INNER_SHARE,
    "mim.batch": COUNT,
    "train.precision": one_of("float32", "bfloat16"),
    "train.batch": ("an even integer >= 2", lambda v: is_int(v) and v >= 2 and v % 2 == 0),
    "optim.schedule": one_of("cosine", "plateau"),
    "optim.lr": POSITIVE,
    "mim.lr": POSITIVE,
    "teacher.dropout": FLAG,
    "student.window": COUNT,
    "student.head_width": COUNT,
    "student.mlp_ratio": COUNT,
    "vit.patch": COUNT,
    "vit.channels": CHANNELS,
    "vit.depth": COUNT,
    "vit.heads": COUNT,
    "vit.hidden": COUNT,
    "vit.head_widths": WIDTHS,
    "mim.decoder.channels": CHANNELS,
    "mim.decoder.depth": COUNT,
    "mim.decoder.heads": COUNT,
    "optim.plateau.factor": INNER_SHARE,
    "optim.plateau.patience": COUNT_OR_0,
    "optim.plateau.cooldown": COUNT_OR_0,
    "optim.plateau.min_scale": SHARE,
    "optim.plateau.holdout": INNER_SHARE,
    "augment.geometry.flip": FLAG,
    "augment.geometry.rotate": ("degrees, 0 to 180", lambda v: is_number(v) and 0 <= v <= 180),
    "augment.geometry.scale": SHARE_BELOW_1,
    "augment.geometry.shift": SHARE_BELOW_1,
    "loss.lambda_dice": NOT_NEGATIVE,
    "loss.lambda_bce": NOT_NEGATIVE,
    "loss.lambda_u": NOT_NEGATIVE,
    "loss.lambda_c": NOT_NEGATIVE,
    "optim.warmup": SHARE_BELOW_1,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.clip": POSITIVE,
    "augment.cutmix": SHARE,
    "augment.cutout": ("0 or a number in [0.02, 0.5]", lambda v: is_number(v) and (v == 0 or 0.02 <= v <= 0.5)),
    "augment.strong_ops": COUNT_OR_0,
    "augment.strong_magnitude": ("a number in [0, 10]", lambda v: is_number(v) and 0 <= v <= 10),
    "augment.labelled_colour": SHARE,
    "augment.weak_colour": SHARE,
    "augment.strong_views": COUNT,
    "augment.upright": FLAG,
    "evaluation.passes": ("an integer >= 2", lambda v: is_int(v) and v >= 2),
    "evaluation.flips": FLAG,
    "evaluation.largest": FLAG,
    "student.outputs": ("1 or 2", lambda v: is_int(v) and v in (1, 2)),
    "student.dropout": SHARE_BELOW_1,
    "vit.dropout": SHARE_BELOW_1,
    "student.widths": WIDTHS,
    "student.stages": ("conv or swin, one a width", lambda v: len(v) > 1 and set(v) <= {"conv", "swin"}),
    "student.skips": ("gate or cross, one a width but the last", lambda v: set(v) <= {"gate", "cross"}),
}


def is_int(v) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def is_number(v) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)


def are_widths(v) -> bool:
    return not isinstance(v, str) and all(is_int(w) and w >= 8 and w % 8 == 0 for w in v)


def is_sum(v, names) -> bool:
    return isinstance(v, str) and set(v.split("+")) <= set(names)


def check_value(key: str, value):
    """Raise UserError unless `value` is right for `key`, a name in RULES."""
    wanted, test = RULES[key]
    try:
        right = test(value)
    except TypeError:  # a test that looks into what is no list
        right = False
    if not right:
        raise UserError(f"config key {key}={value!r}: it must be {wanted}")


def parse_arg(arg: str | None, spec: dict[str, type]) -> dict[str, Any]:
    """`key=value,key=value` after the colon of --config=FILE:... as a dict of the keys given.

    `spec` maps each allowed key to its type (int, float, str). Unknown keys and values of another type raise UserError.
    """
    given = {}
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        key = key.strip()
        if key not in spec:
            raise UserError(f"config key {key!r} is unknown: the keys are {', '.join(spec)}")
        kind = spec[key]
        try:
            if not equals:
                raise ValueError
            given[key] = kind(text.strip())
        except ValueError:
            noun = {int: "an integer", float: "a number"}.get(kind, "a value")
            raise UserError(f"config key {item.strip()!r}: write {key}={noun.replace(' ', '_')}") from None
        if key in RULES:
            check_value(key, given[key])
    return given


def check(config) -> ml_collections.FrozenConfigDict:
    """The whole configuration after every override, frozen; raises UserError for the first thing that cannot work."""
    for key in RULES:
        check_value(key, get(config, key))
    for name, part in (("vit", config.vit), ("mim.decoder", config.mim.decoder)):
        if part.channels % part.heads:
            raise UserError(f"config key {name}.heads={part.heads}: it must divide {name}.channels={part.channels}")
    student = config.student
    kinds = (*zip(student.widths, student.stages, strict=False), *zip(student.widths, student.skips, strict=False))
    for c in [c for c, kind in kinds if kind in ("swin", "cross")]:
        if c % (heads := max(c // student.head_width, 1)):
            raise UserError(f"config key student.head_width={student.head_width}: {c} channels make no {heads} heads")
    if 2 ** len(config.vit.head_widths) != config.vit.patch:
        raise UserError(
            f"config key vit.head_widths={tuple(config.vit.head_widths)}: one width for each halving of vit.patch="
            f"{config.vit.patch}, which must be a power of two"
        )
    semi, stride = config.loss.beta > 0, 2 ** (len(config.student.widths) - 1)
    if config.size % stride or config.size % config.vit.patch:
        raise UserError(
            f"config key size={config.size}: it must be a multiple of the student's stride {stride}"
            f" and of vit.patch={config.vit.patch}"
        )
    if not len(config.student.widths) == len(config.student.stages) == len(config.student.skips) + 1:
        raise UserError("config key student: stages must be as many as widths, skips one less")
    if semi and config.teacher.source == "both" and (config.teacher.passes < 2 or not config.teacher.dropout):
        raise UserError("config key teacher.source=both: it shares the passes, so it needs teacher.passes >= 2 and dropout")
    if semi and config.teacher.passes > 1 and not config.teacher.dropout:
        raise UserError("config key teacher.passes: without teacher.dropout all passes are equal, so it must be 1")
    if config.mim.joint_weight and not semi:
        raise UserError("config key mim.joint_weight: it is computed on the unlabelled images, so it needs loss.beta > 0")
    pretrains = config.mim.steps or config.mim.joint_weight
    if pretrains and config.mim.target == "vit" and not (semi and config.teacher.source != "ema"):
        raise UserError("config key mim.target=vit: there is no ViT with teacher.source=ema or loss.beta=0; say student")
    if config.fold >= 0 and config.dataset != "ph2":
        raise UserError(f"config key fold={config.fold}: {config.dataset} has none; write --config=configs/ph2.py:fold=N")
    if config.dataset == "ph2" and config.split == "dev":
        raise UserError("config key split=dev: PH2's folds have no development part, leave split out")
    if (config.test == "folder") != (config.dataset == "folder"):
        raise UserError(f"config key test={config.test}: a folder is measured on itself, and nothing else is on one")
    if config.dataset == "folder" and not (config.files.images and config.files.masks):
        raise UserError("config keys images and masks: write --config=configs/folder.py:images=DIR,masks=DIR")
    if config.dataset == "folder" and config.split == "dev":
        raise UserError("config key split=dev: a folder has no development part; holdout says what is measured on")
    if config.files.extra and config.dataset != "isic2016":
        raise UserError("config key extra: it adds images to isic2016; a folder's images need only lie in it")
    for key in ("train.steps", "mim.steps", "ema.every"):
        steps_of(get(config, key), epoch=1, key=key)
    if not steps_of(config.ema.every, epoch=10**6):
        raise UserError("config key ema.every=0: the average needs at least one step between its updates")
    for key in ("train.log_every", "train.save_every", "train.figures_every", "optim.plateau.every"):
        if not steps_of(get(config, key), epoch=10**6, total=10**6, key=key):
            raise UserError(f"config key {key}=0: it counts the steps between; 100% is the last step alone")
    return ml_collections.FrozenConfigDict(config)


def get(config, dotted: str):
    """config.a.b for "a.b"."""
    for name in dotted.split("."):
        config = config[name]
    return config


def outlined(config) -> bool:
    """Whether every image of the pool has an outline, hidden or not, with which a report may compare."""
    return config.dataset != "folder" and not config.files.extra


def update(config, changes: dict):
    """Set dotted keys; a key that does not exist raises KeyError, so that a preset cannot invent one."""
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        node = get(config, ".".join(path)) if path else config
        if last not in node:
            raise KeyError(dotted)
        with node.ignore_type():
            node[last] = value


def steps_of(value, *, epoch: int, total: int | None = None, key: str = "steps") -> int:
    """A duration as steps: an integer is steps, "200 epochs" counts passes over the pool, "5%" is a share of `total`.

    Without a `total` a share is refused. Raises UserError.
    """
    text = str(value).strip()
    try:
        if text.endswith("%") and total is not None:
            steps = round(float(text[:-1]) / 100 * total)
        elif text.endswith(("epochs", "epoch")):
            steps = round(float(text.split("epoch")[0]) * epoch)
        else:
            steps = int(text)
        if steps < 0:
            raise ValueError
    except (ValueError, OverflowError):
        share = "" if total is None else " or a share (5%)"
        raise UserError(f"config key {key}={value!r}: write steps (1500), epochs (200 epochs){share}") from None
    return steps


def fingerprint(config) -> str:
    """Eight hex digits of what decides a run's result; where the data lie and how they are read does not."""
    return hashlib.sha256(json.dumps(decides(config), sort_keys=True).encode()).hexdigest()[:8]


def decides(config) -> dict:
    """The leaves that decide a run's result; without what older runs lack: LATER, and `files` where it names no folder."""
    leaves = {k: v for k, v in flat(config).items() if not is_transport(k) and not (k in LATER and v == LATER[k])}
    own = any(leaves.get(f"files.{name}") for name in FOLDERS)
    return {k: v for k, v in leaves.items() if own or not k.startswith("files.")}


def settled(config) -> dict:
    """`decides`, but of a folder of images only that there is one: it may move, and the digest tells it from others."""
    return {k: bool(v) if k.removeprefix("files.") in IMAGES else v for k, v in decides(config).items()}


def without_paths(files: dict) -> dict:
    """The branch `files` of a configuration, as dict, without saying where a folder lies; {} where it names none."""
    given = {name: bool(files.get(name)) for name in FOLDERS}
    return files | given if any(given.values()) else {}


def is_transport(dotted: str) -> bool:
    return any(f"{dotted}.".startswith(f"{key}.") for key in TRANSPORT)


def migrated(tree: dict) -> ml_collections.FrozenConfigDict:
    """The configuration in a run's JSON, an older one's with LATER filled in and its keys RENAMED; `tree` stays as it is."""
    tree = {k: dict(v) if isinstance(v, dict) else v for k, v in tree.items()}
    for dotted, value in LATER.items():
        branch, key = dotted.split(".")
        tree.setdefault(branch, {}).setdefault(key, value)
    for old, new in RENAMED.items():
        (branch, before), after = old.split("."), new.split(".")[1]
        if before in tree.get(branch, {}):
            tree[branch][after] = tree[branch].pop(before)
    return ml_collections.FrozenConfigDict(tree)


def load(workdir) -> ml_collections.FrozenConfigDict:
    """The resolved configuration of a run, an older one's with LATER filled in; UserError when `workdir` holds none."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        return migrated(json.loads(path.read_text())["config"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: --workdir must be a folder that main has trained in") from None
    except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, or of another shape
        raise UserError(f"{path} is not a configuration that main wrote: train again in another --workdir") from None


def save(config, workdir, facts: dict, data: dict | None = None):
    """Write DIR/config.json; refuse a workdir that holds a run of another configuration or on other data.

    facts: where this process comes from (commit, hardware, versions). A run that goes on keeps the first ones and lists
    others in "resumed". Keys that change no result, as where the data lie, are written anew. data: how many images and
    outlines the run has, and their "digest"; runs from before it say nothing.
    """
    path, kept = pathlib.Path(workdir) / "config.json", facts | ({"data": data} if data else {})
    if path.exists():
        begun, kept = load(workdir), json.loads(path.read_text())
        leaves = settled if kept.get("data", {}).get("digest") else decides
        old, new = leaves(begun), leaves(config)
        differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if differ:
            k = differ[0]
            raise UserError(
                f"{workdir} holds a run with {k}={old.get(k, LATER.get(k))!r}, this one has {k}={new.get(k, LATER.get(k))!r}"
                f" ({len(differ)} keys differ): use another --workdir or remove that folder"
            )
        del kept["config"]
        if data and kept.setdefault("data", data) != data:
            before, now = (f"{d['images']} images, {d['labelled']} labelled" for d in (kept["data"], data))
            changed = f"{before}; now {now}" if before != now else f"{now}, but of other names or contents"
            raise UserError(
                f"{workdir} holds a run on other data ({changed}): use another --workdir, or give it the data that it began"
                " with"
            )
        known = [{k: kept.get(k) for k in facts}, *kept.get("resumed", [])]
        if facts not in known:
            kept["resumed"] = [*known[1:], facts]
    whole.write(path, json.dumps({"config": json.loads(config.to_json()), **kept}, indent=1, sort_keys=True))


def flat(config) -> dict:
    """{"a.b": leaf} of a configuration, in JSON's types."""
    return leaves(json.loads(config.to_json()))


def leaves(tree: dict, prefix: str = "") -> dict:
    """{"a.b": leaf} of a tree of dictionaries."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
