"""Gradients of the equations against central differences, in float64, of formulas that share no code with ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mira_u_jax import equations

RNG = np.random.default_rng(0)
SHAPE = (2, 6, 7)
STEP, COORDINATES = 1e-5, 36


def float32(x):
    """Rounded to float32 and kept as float64: both sides start from the very same numbers."""
    return np.asarray(x, np.float32).astype(float)


Z = float32(RNG.normal(0, 3, SHAPE))
Y = (RNG.uniform(size=SHAPE) > 0.6).astype(float)
MU, P_WEAK, A, W = float32(RNG.uniform(size=(4, *SHAPE)))
NOTCUT = (RNG.uniform(size=SHAPE) > 0.3).astype(float)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def bce(z, t):
    return t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)


def agree(ours, formula, x):
    """jax.grad(ours) is the central difference of `formula` at random coordinates of x; both are scalars of x."""
    found = np.asarray(jax.grad(ours)(jnp.asarray(x, jnp.float32)), float)
    picked = RNG.permutation(x.size)[:COORDINATES]
    wanted = []
    for i in picked:
        step = np.zeros(x.size)
        step[i] = STEP
        step = step.reshape(x.shape)
        wanted.append((formula(x + step) - formula(x - step)) / (2 * STEP))
    wanted = np.array(wanted)
    assert (np.abs(wanted) > 1e-6).sum() > COORDINATES / 4  # there is something to agree on
    np.testing.assert_allclose(found.ravel()[picked], wanted, rtol=5e-5, atol=5e-6 * np.abs(wanted).max())


# --- by finite differences --------------------------------------------------------------------------------------------


def test_gradient_of_mim_loss():
    """|x| has no gradient at 0: every value is at least .01 from its patch."""
    patches = float32(RNG.uniform(size=(2, 5, 6)))
    rebuilt = patches + float32(RNG.uniform(0.01, 0.5, patches.shape) * RNG.choice([-1, 1], patches.shape))
    hidden = np.array([[1, 0, 1, 1, 0], [1, 1, 0, 1, 1]], float)
    agree(
        lambda x: equations.mim_loss(x, patches, jnp.asarray(hidden)),
        lambda x: np.abs(x - patches)[hidden == 1].mean(), rebuilt,
    )


def test_gradient_of_cross_entropy():
    agree(lambda z: (W * equations.cross_entropy(z, MU)).sum(), lambda z: (W * bce(z, MU)).sum(), Z)


def test_gradient_of_entropy_loss():
    def formula(z):
        p = sigmoid(z)
        return (-p * np.log(p) - (1 - p) * np.log(1 - p))[NOTCUT == 1].mean()

    agree(lambda z: equations.entropy_loss(z, NOTCUT), formula, Z)


@pytest.mark.parametrize("which", [0, 1], ids=["mu", "sigma"])
@pytest.mark.parametrize("m", [2, 5])
def test_gradient_of_mean_and_deviation(which, m):
    def formula(p):
        return (W * (p.mean(0) if which == 0 else p.std(0, ddof=1))).sum()

    agree(lambda p: (W * equations.mean_and_deviation(p)[which]).sum(), formula, float32(RNG.uniform(size=(m, *SHAPE))))


def test_gradient_of_confidence():
    sigma = float32(RNG.uniform(0.01, 0.5, SHAPE))
    agree(lambda s: (W * equations.confidence(s, 0.15)).sum(), lambda s: (W * np.exp(-s / 0.15)).sum(), sigma)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_gradient_of_supervised_loss(weights):
    dice, ce = weights

    def formula(z):
        p = sigmoid(z)
        overlap = [(2 * (p[i] * Y[i]).sum() + 1) / (p[i].sum() + Y[i].sum() + 1) for i in range(len(z))]
        return dice * (1 - np.mean(overlap)) + ce * bce(z, Y).mean()

    agree(lambda z: equations.supervised_loss(z, Y, lambda_dice=dice, lambda_bce=ce), formula, Z)


@pytest.mark.parametrize("norm", ["weights", "pixels"])
@pytest.mark.parametrize("distance", ["cross_entropy", "squared"])
def test_gradient_of_unsupervised_loss(norm, distance):
    def formula(z):
        p = sigmoid(z)
        error = 0.7 * (bce(z, MU) if distance == "cross_entropy" else (p - MU) ** 2) + 0.3 * (p - P_WEAK) ** 2
        return (A * error).sum() / (A.sum() if norm == "weights" else z.size)

    settings = dict(lambda_u=0.7, lambda_c=0.3, norm=norm, distance=distance)
    agree(lambda z: equations.unsupervised_loss(z, MU, P_WEAK, A, **settings), formula, Z)


# --- at the limits ----------------------------------------------------------------------------------------------------

UNSUPERVISED = {
    f"unsupervised {distance} {norm}": functools.partial(equations.unsupervised_loss, distance=distance, norm=norm)
    for distance in ("cross_entropy", "squared") for norm in ("weights", "pixels")
}
# name -> scalar loss of logits (b, h, w), with targets that hold 0, 1 and values between
LOSSES = {
    "cross_entropy": lambda z: equations.cross_entropy(z, Y).mean(),
    "entropy": lambda z: equations.entropy_loss(z, NOTCUT),
    "supervised": lambda z: equations.supervised_loss(z, Y),
    "supervised, empty masks": lambda z: equations.supervised_loss(z, 0 * Y),
    "supervised, full masks": lambda z: equations.supervised_loss(z, 0 * Y + 1),
    "mim": lambda z: equations.mim_loss(z, MU, jnp.ones(SHAPE[:2])),
} | {
    name: lambda z, loss=loss: loss(z, np.where(Y > 0, MU, np.round(MU)), P_WEAK, A) for name, loss in UNSUPERVISED.items()
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [30.0, 88.0, 104.0, 1e4])  # exp overflows float32 from 88.7 on, exp(-104) is 0
def test_losses_and_gradients_of_extreme_logits_are_finite(name, size):
    """On all right, all wrong and mixed logits; nothing may be inf - inf or 0 * inf."""
    for z in (np.full(SHAPE, size), np.full(SHAPE, -size), size * (2 * Y - 1), size * (1 - 2 * Y)):
        value, grad = jax.value_and_grad(LOSSES[name])(jnp.asarray(z, jnp.float32))
        assert np.isfinite(value) and np.isfinite(grad).all(), (name, z.ravel()[:3])
        assert value >= 0
        assert np.abs(grad).max() <= 1  # the steepest, CE, has slope 1


def test_a_sure_and_wrong_pixel_is_still_pulled_back_by_cross_entropy_and_not_by_the_square():
    z = jnp.full(SHAPE, 1e4)
    ones, none = np.ones(SHAPE), np.zeros(SHAPE)
    pull = jax.grad(lambda z: equations.unsupervised_loss(z, none, none, ones))(z)
    np.testing.assert_allclose(pull, ones / ones.size, rtol=1e-6)
    flat = jax.grad(lambda z: equations.unsupervised_loss(z, none, none, ones, distance="squared"))(z)
    assert not np.asarray(flat).any()


@pytest.mark.parametrize("name", UNSUPERVISED)
def test_where_no_pixel_weighs_there_is_no_gradient(name):
    value, grad = jax.value_and_grad(lambda z: UNSUPERVISED[name](z, MU, P_WEAK, 0 * A))(jnp.asarray(Z, jnp.float32))
    assert value == 0 and not np.asarray(grad).any()


def test_where_everything_is_cut_or_nothing_hidden_there_is_no_gradient():
    entropy = jax.grad(lambda z: equations.entropy_loss(z, 0 * NOTCUT))(jnp.asarray(Z, jnp.float32))
    mim = jax.grad(lambda x: equations.mim_loss(x, MU, jnp.zeros(SHAPE[:2])))(jnp.asarray(Z, jnp.float32))
    assert not np.asarray(entropy).any() and not np.asarray(mim).any()


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_empty_and_full_masks_pull_every_logit_their_way(y):
    grad = jax.grad(lambda z: equations.supervised_loss(z, np.full(SHAPE, y)))(jnp.zeros(SHAPE))
    assert (np.sign(grad) == (1 if y == 0 else -1)).all()
