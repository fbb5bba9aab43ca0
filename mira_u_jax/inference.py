"""What a trained run says about images: logits, the mean p of dropout passes and their deviation, compiled once."""

import dataclasses
import functools
import itertools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mira_u_jax import checkpoint, config, equations, pseudo, steps
from mira_u_jax.errors import UserError
from mira_u_jax.rng import named

PIXELS = 2**18  # of a batch at most, 2 to 16 images: all passes of a batch are computed at once
BEFORE = {"passes": 8, "flips": False}  # of runs whose configuration has no `evaluation` yet


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


def maps(params, image, key, *, network, passes: int) -> dict[str, jax.Array]:
    """What a network says about uint8 images (b, s, s, 3), (b, s, s) float32 each.

    logits: dropout off, the mask is where they are > 0; mean: the logit of the mean p of `passes` dropout passes, within
    +-13.8; sigma: the deviation of their p (Eq. 4).
    """
    mu, sigma = equations.mean_and_deviation(pseudo.teacher_passes(network, params, steps.to_float(image), key, passes))
    mu = jnp.clip(mu, 1e-6, 1 - 1e-6)
    logits = steps.eval_step(params, image, network=network)
    return {"logits": logits, "mean": jnp.log(mu) - jnp.log1p(-mu), "sigma": sigma}


def alike(params, image, key, *, network, passes: int) -> dict[str, jax.Array]:
    """`maps`, but all images meet the same `passes` thinned networks: what one gets does not depend on its batch."""

    def one(image):
        return {name: values[0] for name, values in maps(params, image[None], key, network=network, passes=passes).items()}

    return jax.vmap(one)(image)


class Predictor:
    """The averaged network of a run, compiled once: predictor(examples) yields (example, maps of it).

    network: student, or vit to look at the teacher; flips: None is as the run's configuration says. Raises UserError.
    """

    def __init__(self, workdir, network: str = "student", flips: bool | None = None):
        self.settings = settings = config.load(workdir)
        options = settings.get("evaluation", BEFORE)
        self.passes, self.flips = options["passes"], options["flips"] if flips is None else flips
        names = steps.network_names(settings)
        if network not in names:
            raise UserError(f"--network={network}: this run has {', '.join(names)}")
        self.name = network + ("+flips" if self.flips else "")
        self.params = checkpoint.load_ema(workdir, steps.abstract_params(settings))[network]
        self.key = named(jax.random.key(settings.seed), "evaluation")
        self.batch = min(max(PIXELS // settings.size**2, 2), 16)
        module = steps.make_networks(names, "train", settings)[network]
        self.network = Mirrored(module) if self.flips else module
        self.step = jax.jit(functools.partial(maps, network=self.network, passes=self.passes))

    def __call__(self, examples):
        """examples: iterable of what has .image (s, s, 3) uint8; the last batch is padded."""
        for i, group in enumerate(batched(examples, self.batch)):
            image = np.stack([e.image for e in group])
            padded = np.concatenate([image, np.zeros((self.batch - len(group), *image.shape[1:]), np.uint8)])
            found = jax.device_get(self.step(self.params, padded, jax.random.fold_in(self.key, i)))
            for j, example in enumerate(group):
                yield example, {name: values[j] for name, values in found.items()}


def batched(items, count):
    """Tuples of `count` items, the last may be shorter: itertools.batched of Python 3.12."""
    items = iter(items)
    while group := tuple(itertools.islice(items, count)):
        yield group


def at_size(values: np.ndarray, shape) -> np.ndarray:
    """A map (s, s), as logits, bilinearly resampled to `shape` (h, w), half-pixel centres."""
    return cv2.resize(values, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
