"""The paper's equations, one pure function each. The paper numbers none; docs/paper.md maps our numbers to its sections.

z are logits, p = sigmoid(z) probabilities, natural logarithms throughout; every function computes in float32.
Shapes: b images, h w pixels, m dropout passes, n patches.
"""

import jax
import jax.numpy as jnp
import optax


def mim_loss(reconstruction, patches, hidden):
    """Eq. (1): L_MIM, section 3.1.1. Mean absolute error over the hidden patches and their values.

    reconstruction, patches: (b, n, v) RGB in [0, 1]; hidden: (b, n), 1 where the patch was hidden. Returns a scalar.
    """
    error = jnp.abs(f32(reconstruction) - f32(patches)).mean(-1)  # b n
    return (error * hidden).sum() / jnp.maximum(hidden.sum(), 1.0)


def cross_entropy(z, target):
    """Eq. (2): L_cons per pixel, section 3.1.2. CE(target, p) = softplus(z) - target z; `target` in [0, 1], same shape."""
    return jax.nn.softplus(f32(z)) - f32(target) * f32(z)


def entropy_loss(z, notcut):
    """Eq. (3): L_ent, section 3.1.2. Mean binary entropy of sigmoid(z) over the pixels that CutOut left.

    z, notcut: (b, h, w), notcut 0 where the image was cut out. Returns a scalar in [0, ln 2].
    """
    z, notcut = f32(z), f32(notcut)
    entropy = jax.nn.softplus(z) - z * jax.nn.sigmoid(z)
    return (entropy * notcut).sum() / jnp.maximum(notcut.sum(), 1.0)


def mean_and_deviation(p):
    """Eq. (4): mu and sigma, section 3.1.3. Over the first axis, the m passes; ddof 1, and sigma = 0 when m is 1.

    p: (m, ...) probabilities. Returns mu in [0, 1] and sigma in [0, sqrt(1/2)], both (...).
    """
    p = f32(p)
    mu = p.mean(0)
    m = p.shape[0]
    return mu, (jnp.sqrt(jnp.square(p - mu[None]).sum(0) / (m - 1)) if m > 1 else jnp.zeros_like(mu))


def to_logits(p):
    """Logits of probabilities, within +-13.8: no mean of passes is sure. Same shape."""
    return jax.scipy.special.logit(jnp.clip(f32(p), 1e-6, 1 - 1e-6))


def confidence(sigma, kappa):
    """Eq. (5): w = exp(-sigma / kappa), section 3.1.3. In (0, 1], 1 where the passes agree."""
    return jnp.exp(-f32(sigma) / kappa)


def keep_certain(sigma, tau_u):
    """The filter of section 3.1.3: 1 where sigma < tau_u, else 0."""
    return f32(f32(sigma) < tau_u)


def keep_low_entropy(mu, share):
    """The filter of UA-MT (Yu et al. 2019): 1 where the entropy of mu < (.75 + .25 ramp_up(share)) ln 2, share in [0, 1]."""
    mu = f32(mu)
    entropy = jax.scipy.special.entr(mu) + jax.scipy.special.entr(1 - mu)
    return f32(entropy < (0.75 + 0.25 * ramp_up(share, 1.0)) * jnp.log(2.0))


def ema_update(phi, theta, t, alpha):
    """Eq. (6): phi <- alpha phi + (1 - alpha) theta, section 3.1.4, with alpha <- min(1 - 1 / (t + 1), alpha).

    phi and theta are trees of one structure with leaves of one shape, else ValueError: nothing is skipped or broadcast. t
    counts updates from 0, so that the first one copies theta and early averages do not remember the initial weights.
    """
    def layout(tree):
        return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    if layout(phi) != layout(theta):
        raise ValueError("ema_update: phi and theta are different trees")
    alpha = jnp.minimum(1.0 - 1.0 / (t + 1.0), alpha)
    return optax.incremental_update(theta, phi, 1.0 - alpha)


def supervised_loss(z, y, *, lambda_dice=0.5, lambda_bce=0.5):
    """Eq. (7): L_sup, section 3.3. lambda_dice * Dice loss + lambda_bce * binary cross-entropy.

    z, y: (b, h, w), y in [0, 1]. Dice is the mean over images of 1 - (2 sum p y + 1) / (sum p + sum y + 1). Scalar.
    """
    z, y = f32(z), f32(y)
    p = jax.nn.sigmoid(z)
    overlap = (2 * (p * y).sum((1, 2)) + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)
    return lambda_dice * (1 - overlap).mean() + lambda_bce * cross_entropy(z, y).mean()


def unsupervised_loss(z, mu, p_weak, a, *, lambda_u=1.0, lambda_c=0.1, distance="cross_entropy", norm="weights"):
    """Eq. (8): L_unsup, section 3.3. Weighted mean of lambda_u CE(mu, p) + lambda_c (p - p_weak)^2 over all pixels.

    z, mu, p_weak, a: (b, h, w). `a` = w * keep * notcut in [0, 1] weighs a pixel. norm="weights" divides by max(sum a, 1)
    (the paper; a uniformly low w cancels), norm="pixels" by their number. distance="squared" puts (p - mu)^2 in the place
    of CE, as Mean Teacher and UA-MT do. Returns a scalar.
    """
    z, a = f32(z), f32(a)
    p = jax.nn.sigmoid(z)
    to_teacher = cross_entropy(z, mu) if distance == "cross_entropy" else jnp.square(p - f32(mu))
    error = lambda_u * to_teacher + lambda_c * jnp.square(p - f32(p_weak))
    return (a * error).sum() / (jnp.maximum(a.sum(), 1.0) if norm == "weights" else a.size)


def ramp_up(step, length):
    """beta(t), section 3.3: exp(-5 (1 - min(t / T, 1))^2), from .0067 at t = 0 to 1 at t = T = `length` steps.

    0 before t = 0, for a stage that starts with labels alone; 1 throughout for length = 0.
    """
    share = jnp.minimum(step / length, 1.0) if length else jnp.ones(())
    return jnp.where(jnp.asarray(step) < 0, 0.0, jnp.exp(-5.0 * jnp.square(1.0 - share)))


def total_loss(l_sup, l_unsup, l_ent, beta, gamma):
    """Eq. (9): L = L_sup + beta(t) L_unsup + gamma L_ent, section 3.3."""
    return l_sup + beta * l_unsup + gamma * l_ent


def f32(x):
    return jnp.asarray(x, jnp.float32)
