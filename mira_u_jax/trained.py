"""A finished run as a pure function of images: what prediction and export share."""

import pathlib

import jax

from mira_u_jax import checkpoint, config, equations, pseudo, steps
from mira_u_jax.errors import UserError
from mira_u_jax.rng import named

PASSES = 8  # dropout passes behind mean and sigma, unless a caller says otherwise


def load(workdir, network: str = "student"):
    """(settings, network, its averaged parameters) of a run of main. Raises UserError where there is none."""
    if not pathlib.Path(workdir).is_dir():
        raise UserError(f"--workdir={workdir}: no such folder; give one that main has trained in")
    settings = config.load(workdir)
    if network not in steps.network_names(settings):
        raise UserError(f"--network={network}: this run has {', '.join(steps.network_names(settings))}")
    params = checkpoint.load_ema(workdir, steps.abstract_params(settings))[network]
    return settings, steps.make_networks((network,), "train", settings)[network], params


def look(params, image, *, network, passes: int = PASSES, seed: int = 0) -> dict[str, jax.Array]:
    """{"logits", "mean", "sigma"}, (b, s, s) float32 each, of uint8 images (b, s, s, 3). Eq. (4) at prediction.

    logits: dropout off; mean in [0, 1] and sigma in [0, .71] over `passes` dropout passes, sigma = 0 for one pass. All
    images meet the same `passes` thinned networks, drawn by `seed`: what one gets does not depend on its batch.
    """
    key = named(jax.random.key(seed), "predict")

    def one(image):  # s s 3 -> m s s
        return pseudo.teacher_passes(network, params, image[None], key, passes)[:, 0]

    mean, sigma = equations.mean_and_deviation(jax.vmap(one, out_axes=1)(steps.to_float(image)))
    return {"logits": steps.eval_step(params, image, network=network), "mean": mean, "sigma": sigma}
