"""What the teacher says about images that nobody outlined: M passes, pseudo-labels, and a report on them. Section 3.1.3."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from mira_u_jax import equations
from mira_u_jax.rng import named, per_example

LEARNERS = ("student", "vit")


@struct.dataclass
class PseudoLabel:
    """One value a pixel, (b, h, w) float32 each, no gradient. Eqs. (4), (5), Algorithm 2."""

    mu: jax.Array  # mean of the passes
    sigma: jax.Array  # their deviation
    w: jax.Array  # confidence in (0, 1]
    keep: jax.Array  # 1 where the filter lets the pixel through, else 0
    target: jax.Array  # what the loss aims at, in [0, 1]


def passes_for(learner: str, source: str, passes: int) -> dict[str, int]:
    """{network: number of passes} that make the pseudo-label from which `learner` ("student" or "vit") learns."""
    return {
        "both": {"vit": passes - passes // 2, "student": passes // 2},
        "vit": {"vit": passes},
        "ema": {"student": passes},
        "cross": {"vit" if learner == "student" else "student": passes},
    }[source]


def teacher_passes(network, params, image, key, passes: int, chunk: int = 0):
    """`passes` stochastic probabilities of each image, (m, b, h, w); m counts every output of every pass. Section 3.1.3.

    vmap over examples outside and over keys inside, key = fold_in(key, global example, pass): the masks do not depend on
    the number of devices, nothing is gathered, and what lies before the first dropout is computed once per example.

    chunk: so many passes at a time, one group after the other, in the memory of one group; 0 is all at once. The same
    passes, but what lies before the first dropout is computed once per group.
    """

    def one(key, image):
        step = lambda k: jax.nn.sigmoid(network.outputs(params, image[None], key=k)[:, 0])  # noqa: E731
        keys = per_example(key, passes)
        return jax.lax.map(step, keys, batch_size=chunk) if 0 < chunk < passes else jax.vmap(step)(keys)

    p = jax.vmap(one, out_axes=2)(per_example(key, image.shape[0]), image)
    return rearrange(p, "m k b h w -> (m k) b h w")


def pseudo_labels(state, image, key, *, networks, config, share) -> dict[str, PseudoLabel]:
    """What each learner is taught about weak views (b, h, w, 3): {"student": PseudoLabel, "vit": ...}.

    teacher.source says whose passes a learner hears, teacher.weights whether of phi (ema) or of theta (online); share in
    [0, 1] is how far the stage has come, for filters that open with time.
    """
    cfg = config.teacher
    weights = state.ema if cfg.weights == "ema" else state.params

    @functools.cache  # two learners that hear the same passes share them
    def label(source: tuple[tuple[str, int], ...]) -> PseudoLabel:
        if cfg.dropout:
            p = {n: teacher_passes(networks[n], weights[n], image, named(key, n), m, cfg.chunk) for n, m in source}
        else:
            p = {n: jax.nn.sigmoid(networks[n].outputs(weights[n], image)) for n, _ in source}
        mu, sigma = equations.mean_and_deviation(jnp.concatenate(list(p.values())))
        w = equations.confidence(sigma, config.pseudo.kappa) if config.pseudo.weight == "confidence" else jnp.ones_like(mu)
        target = {
            "mu": lambda: mu, "hard": lambda: equations.f32(mu > 0.5), "paper": lambda: w * mu,
            "student": lambda: p["student"].mean(0),  # its own passes say what, all passes how surely
        }[config.pseudo.label]()
        return jax.lax.stop_gradient(PseudoLabel(mu, sigma, w, keep(mu, sigma, config.pseudo, share), target))

    learners = [name for name in LEARNERS if name in networks]
    return {learner: label(tuple(passes_for(learner, cfg.source, cfg.passes).items())) for learner in learners}


def keep(mu, sigma, cfg, share):
    """1 where a pixel may teach: what every filter named in `cfg.filter`, joined by +, lets through."""
    filters = {
        "sigma": lambda: equations.keep_certain(sigma, cfg.tau_u),
        "probability": lambda: equations.f32(jnp.maximum(mu, 1 - mu) > cfg.tau_p),
        "entropy": lambda: equations.keep_low_entropy(mu, share),
        "none": lambda: jnp.ones_like(mu),
    }
    return functools.reduce(jnp.multiply, [filters[name]() for name in cfg.filter.split("+")])


# --- what a run watches; nothing below reaches a loss --------------------------------------------------------------------


def report(label: PseudoLabel, p_w, truth, *, filtered: bool) -> dict[str, jax.Array]:
    """Scalars about the student's pseudo-labels, its own weak prediction p_w and the hidden masks, (b, h, w) each.

    sigma and w also in the band around the teacher's outline (a pixel whose 5x5 neighbourhood holds both classes), where
    they must be alive: over plain skin every teacher is sure. Dice of mu and of p_w, means over images. Where there is a
    filter, the share it keeps, and for the pixels kept and dropped apart, Dice and expected calibration error of mu over
    all of them. NaN where a batch has no such pixel. truth None: nobody outlined them; what needs an outline is left out.
    """
    band = near_outline(label.mu)
    found = {
        "sigma": label.sigma.mean(), "sigma_outline": mean_where(label.sigma, band),
        "w": label.w.mean(), "w_outline": mean_where(label.w, band),
    }
    if filtered:
        found["keep"] = label.keep.mean()
    if truth is None:
        return found
    truth = equations.f32(truth > 0.5)
    found |= {"teacher_dice": dice(label.mu, truth, (1, 2)).mean(), "student_dice": dice(p_w, truth, (1, 2)).mean()}
    if not filtered:
        return found
    for name, where in (("kept", label.keep), ("dropped", 1 - label.keep)):
        some = where.sum() > 0
        found[f"{name}_dice"] = jnp.where(some, dice(label.mu * where, truth * where, None), jnp.nan)
        found[f"{name}_ece"] = jnp.where(some, calibration_error(label.mu, truth, where), jnp.nan)
    return found


def near_outline(p, size: int = 5):
    """1 where the size x size neighbourhood of p > .5 holds both classes, (b, h, w)."""

    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size), (1, 1, 1), "SAME")

    hard = equations.f32(p > 0.5)
    return equations.f32((pool(hard) > 0.5) & (pool(1 - hard) > 0.5))


def mean_where(x, where):
    return jnp.where(where.sum() > 0, (x * where).sum() / where.sum(), jnp.nan)


def dice(p, truth, axis):
    """Dice of p > .5 against a binary truth, sums over `axis`. Both halves plus 1, so that it is 1 where both are empty;
    metrics.scores, which measures, adds nothing.
    """
    p = equations.f32(p > 0.5)
    return (2 * (p * truth).sum(axis) + 1) / (p.sum(axis) + truth.sum(axis) + 1)


def calibration_error(p, truth, where, bins: int = 10):
    """Expected calibration error over the pixels `where`: |mean p - share of truth| in each bin of p = P(lesion)."""
    index = jnp.clip((p * bins).astype(jnp.int32), 0, bins - 1)
    gap = jax.ops.segment_sum(jnp.ravel(where * (p - truth)), jnp.ravel(index), num_segments=bins)
    return jnp.abs(gap).sum() / jnp.maximum(where.sum(), 1)
