"""A finished run as a pure function of images: what evaluation, prediction and export share."""

import dataclasses
import functools
import itertools
import json
import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mira_u_jax import checkpoint, config, equations, pseudo, steps
from mira_u_jax.errors import UserError
from mira_u_jax.rng import named

PIXELS = 2**18  # of a batch at most, in 2 to 16 images: all passes of a batch are computed at once


@dataclasses.dataclass(frozen=True)
class Mirrored:
    """A Network whose logits are the mean over the four flips of an image, each flipped back."""

    network: steps.Network

    def __call__(self, params, image, key=None):
        return self.outputs(params, image, key=key)[0]

    def outputs(self, params, image, key=None):  # b h w 3 -> k b h w
        axes = ((), (-2,), (-1,), (-2, -1))
        views = jnp.concatenate([jnp.flip(image, tuple(a - 1 for a in axis)) for axis in axes])
        z = rearrange(self.network.outputs(params, views, key=key), "k (f b) h w -> f k b h w", f=len(axes))
        return jnp.stack([jnp.flip(part, axis) for part, axis in zip(z, axes, strict=True)]).mean(0)


@dataclasses.dataclass(frozen=True)
class Together:
    """Networks by name as one: its logits are the mean of theirs, its outputs theirs one after the other."""

    networks: tuple[tuple[str, steps.Network | Mirrored], ...]

    def __call__(self, params, image, key=None):
        return jnp.stack([network(params[name], image, key=key) for name, network in self.networks]).mean(0)

    def outputs(self, params, image, key=None):  # b h w 3 -> k b h w, k of all networks
        keys = [key if key is None else named(key, name) for name, _ in self.networks]
        found = [n.outputs(params[name], image, key=k) for (name, n), k in zip(self.networks, keys, strict=True)]
        return jnp.concatenate(found)


NETWORKS = ("student", "vit", "all")  # all: the mean of those that a run has


def members(settings, network: str) -> list[str]:
    """The networks of a run that one of NETWORKS stands for; UserError where the run has no such network."""
    names = [name for name in pseudo.LEARNERS if name in steps.network_names(settings)]
    if network not in (*names, "all"):
        raise UserError(f"--network={network}: this run has {', '.join(names)}")
    return names if network == "all" else [network]


def load(workdir, settings, network: str, flips: bool):
    """(network, its averaged parameters) of a run of these settings; flips: whether it is Mirrored. Raises UserError."""
    names = members(settings, network)
    params = checkpoint.load_ema(workdir, steps.abstract_params(settings))
    modules = steps.make_networks(names, "train", settings)
    if flips:
        modules = {name: Mirrored(module) for name, module in modules.items()}
    if network == "all":
        return Together(tuple(modules.items())), {name: params[name] for name in names}
    return modules[network], params[network]


def look(params, image, *, network, passes: int, seed: int = 0) -> dict[str, jax.Array]:
    """{"logits", "mean_logits", "sigma"}, (b, s, s) float32 each, of uint8 images (b, s, s, 3). Eq. (4) at prediction.

    logits: dropout off, of which the mask is made; mean_logits: of the mean probability over `passes` dropout passes (of
    each network that is Together), of which a temperature makes the calibrated one; sigma in [0, .71]: their deviation. All
    images meet the same thinned networks, drawn by `seed`: what one gets does not depend on its batch. Where the network is
    Mirrored each of the four views meets a thinned network of its own, so a pass is the mean of four and sigma is smaller.
    """
    key = named(jax.random.key(seed), "predict")

    def one(image):  # s s 3 -> m s s
        return pseudo.teacher_passes(network, params, image[None], key, passes)[:, 0]

    mean, sigma = equations.mean_and_deviation(jax.vmap(one, out_axes=1)(steps.to_float(image)))
    logits = steps.eval_step(params, image, network=network)
    return {"logits": logits, "mean_logits": equations.to_logits(mean), "sigma": sigma}


def temperatures(workdir) -> dict[str, dict]:
    """DIR/temperature.json: by Predictor.name what was fitted on the run's labelled images; {} where nothing is whole."""
    try:
        return json.loads((pathlib.Path(workdir) / "temperature.json").read_text())
    except (FileNotFoundError, ValueError):  # it can be fitted again
        return {}


class Predictor:
    """The averaged network of a run, compiled once: predictor(examples) yields (example, maps).

    network: student, vit to look at the teacher, or all for the mean of both; flips, largest: None is as the run's
    configuration says. Raises UserError.
    """

    def __init__(self, workdir, network: str = "student", flips: bool | None = None, largest: bool | None = None):
        if not pathlib.Path(workdir).is_dir():
            raise UserError(f"--workdir={workdir}: no such folder; give one that main has trained in")
        self.settings = config.load(workdir)
        self.passes = self.settings.evaluation.passes
        self.flips = self.settings.evaluation.flips if flips is None else flips
        self.largest = self.settings.evaluation.largest if largest is None else largest
        self.network, self.params = load(workdir, self.settings, network, self.flips)
        self.name = network + ("+flips" if self.flips else "")
        # of the probability that predict and export give; 1, none, where it was not fitted for this network and its views
        self.temperature = temperatures(workdir).get(self.name, {}).get("temperature") or 1.0
        self.batch = batch_of(self.settings.size)
        self.step = jax.jit(functools.partial(look, network=self.network, passes=self.passes))

    def __call__(self, examples):
        """examples: iterable of what has .image (s, s, 3) uint8; maps (s, s) as look's. The last batch is padded."""
        for group in batched(examples, self.batch):
            found = jax.device_get(self.step(self.params, padded([e.image for e in group], self.batch)))
            for i, example in enumerate(group):
                yield example, {name: values[i] for name, values in found.items()}


def mask_of(logits: np.ndarray, *, largest: bool) -> np.ndarray:
    """Where logits (h, w) > 0, bool; largest: of that the largest part whose pixels touch, corners included."""
    mask = logits > 0
    if not largest or not mask.any():
        return mask
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return parts == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])  # part 0 is the skin


def check_passes(passes: int):
    """UserError for a --passes of which there is no deviation; 0 is as the run is evaluated."""
    if passes != 0 and passes < 2:
        raise UserError(f"--passes={passes}: it must be 0, as the run is evaluated, or >= 2, as one does not deviate")


def batch_of(size: int) -> int:
    """How many images of size x size are looked at together."""
    return min(max(PIXELS // size**2, 2), 16)


def padded(images, count: int) -> np.ndarray:
    """uint8 (count, s, s, 3) of `count` images or fewer: black ones fill up, so that one program serves every batch."""
    return np.stack([*images, *[np.zeros_like(images[0])] * (count - len(images))])


def batched(items, count):
    """Tuples of `count` items, the last may be shorter: itertools.batched of Python 3.12."""
    items = iter(items)
    while group := tuple(itertools.islice(items, count)):
        yield group


def at_size(values: np.ndarray, shape) -> np.ndarray:
    """A map (s, s), as logits, bilinearly resampled to `shape` (h, w), half-pixel centres."""
    return cv2.resize(values, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
