"""Every equation against float64 NumPy written from its formula, and at its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mira_u_jax import equations

RNG = np.random.default_rng(0)
Z = RNG.normal(0, 3, (3, 5, 7))
Y = (RNG.uniform(size=Z.shape) > 0.6).astype(float)
MU, P_WEAK, A = RNG.uniform(size=(3, *Z.shape))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def bce(z, t):
    """-t ln p - (1 - t) ln(1 - p), ln p written so that it stays finite."""
    return t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)


def entropy(p):
    return -np.sum([q * np.log(np.where(q > 0, q, 1)) for q in (p, 1 - p)], axis=0)  # 0 ln 0 = 0


def close(found, wanted, rtol=2e-6, atol=2e-6):
    assert jnp.asarray(found).dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol, atol)


# --- Eq. (1) ----------------------------------------------------------------------------------------------------------


def test_mim_loss_is_the_mean_over_hidden_patches_and_their_values():
    rebuilt, patches = RNG.uniform(size=(2, 2, 6, 12))
    hidden = np.array([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]], float)
    wanted = np.abs(rebuilt - patches)[hidden == 1].mean()
    close(equations.mim_loss(rebuilt, patches, jnp.asarray(hidden)), wanted)


def test_mim_loss_ignores_visible_patches_and_survives_an_empty_mask():
    patches = RNG.uniform(size=(2, 4, 3))
    hidden = jnp.zeros((2, 4)).at[:, 0].set(1)
    rebuilt = patches + 9.0
    rebuilt[:, 0] = patches[:, 0]
    close(equations.mim_loss(rebuilt, patches, hidden), 0)
    close(equations.mim_loss(rebuilt, patches, jnp.zeros((2, 4))), 0)


# --- Eq. (2), (3) -----------------------------------------------------------------------------------------------------


def test_cross_entropy():
    close(equations.cross_entropy(Z, MU), bce(Z, MU))


@pytest.mark.parametrize("z", [-100.0, 100.0])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_cross_entropy_of_extreme_logits_is_finite_and_right(z, target):
    close(equations.cross_entropy(z, target), bce(z, target), atol=1e-5)


def test_cross_entropy_gradient_is_p_minus_target():
    close(jax.grad(lambda z: equations.cross_entropy(z, MU).sum())(jnp.asarray(Z)), sigmoid(Z) - MU)


def test_entropy_loss_is_the_mean_entropy_of_the_pixels_left():
    notcut = (RNG.uniform(size=Z.shape) > 0.3).astype(float)
    close(equations.entropy_loss(Z, notcut), entropy(sigmoid(Z))[notcut == 1].mean())


def test_entropy_loss_limits():
    ones = np.ones((1, 2, 2))
    close(equations.entropy_loss(0 * ones, ones), np.log(2))  # p = 1/2 is the largest entropy
    close(equations.entropy_loss(100 * ones, ones), 0)
    close(equations.entropy_loss(-100 * ones, ones), 0)
    close(equations.entropy_loss(ones, 0 * ones), 0)  # everything cut


def test_entropy_gradient_is_minus_z_p_1_minus_p():
    p = sigmoid(Z)
    close(jax.grad(lambda z: equations.entropy_loss(z, np.ones(Z.shape)))(jnp.asarray(Z)), -Z * p * (1 - p) / Z.size)


# --- Eq. (4), (5), Algorithm 2 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 8])
def test_mean_and_deviation_with_ddof_1(m):
    p = RNG.uniform(size=(m, 2, 3, 3))
    mu, sigma = equations.mean_and_deviation(p)
    close(mu, p.mean(0))
    close(sigma, p.std(0, ddof=1))


def test_one_pass_has_no_deviation():
    mu, sigma = equations.mean_and_deviation(MU[None])
    close(mu, MU)
    close(sigma, np.zeros(MU.shape), atol=0)


def test_two_opposite_passes_have_the_largest_deviation():
    mu, sigma = equations.mean_and_deviation(np.array([[0.0], [1.0]]))
    close(mu, [0.5])
    close(sigma, [np.sqrt(0.5)])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.7])
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_passes_that_agree_are_certain_and_kept(value, m):
    """sigma = 0, up to the rounding of a mean: w = 1 and keep = 1 under any filter on sigma. mu 0 and 1 stay 0 and 1."""
    mu, sigma = equations.mean_and_deviation(np.full((m, 4), value))
    close(mu, np.full(4, value), atol=1e-7)
    close(sigma, np.zeros(4), atol=1e-7)
    close(equations.confidence(sigma, 0.1), np.ones(4))
    close(equations.keep_certain(sigma, 1e-3), np.ones(4), atol=0)
    if value in (0, 1):
        assert (np.asarray(mu) == value).all() and not np.asarray(sigma).any()


def test_confidence():
    sigma = RNG.uniform(0, 0.7, (4, 4))
    close(equations.confidence(sigma, 0.1), np.exp(-sigma / 0.1))
    close(equations.confidence(np.zeros(3), 0.1), np.ones(3), atol=0)


def test_keep_certain_is_a_strict_threshold():
    close(equations.keep_certain(np.array([0, 0.25, 0.5, 0.75]), 0.5), [1, 1, 0, 0], atol=0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_keep_low_entropy_is_the_threshold_of_ua_mt(share):
    mu = np.linspace(0, 1, 401)
    threshold = (0.75 + 0.25 * np.exp(-5 * (1 - share) ** 2)) * np.log(2)
    close(equations.keep_low_entropy(mu, share), entropy(mu) < threshold, atol=0)
    close(equations.keep_low_entropy(mu, jnp.asarray(share)), entropy(mu) < threshold, atol=0)  # traced, as in the step


def test_keep_low_entropy_limits():
    """Entropy is 0 and not NaN at mu 0 and 1, also where a mean of ones has been rounded up; mu = 1/2 is never kept."""
    sure = np.array([0, 1, np.nextafter(np.float32(1), np.float32(2)), 1e-30], np.float32)
    for share in (0.0, 1.0):
        close(equations.keep_low_entropy(sure, share), np.ones(4), atol=0)
        close(equations.keep_low_entropy(np.array([0.5]), share), [0], atol=0)
    close(equations.keep_low_entropy(np.array([0.7]), 0.0), [0], atol=0)  # entropy .88 ln 2: the filter opens with time
    close(equations.keep_low_entropy(np.array([0.7]), 1.0), [1], atol=0)


# --- Eq. (6) ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.0), (1, 0.5), (500, 0.99)])
def test_ema_update_equals_the_formula_on_every_leaf(step, alpha):
    """alpha = min(1 - 1 / (t + 1), .99): 0 at t = 0 copies theta, 1/2 at t = 1, .99 from t = 99 on."""
    draw = lambda: {"student": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)}, "vit": [RNG.normal(size=4)]}  # noqa: E731
    phi, theta = draw(), draw()
    found = equations.ema_update(*jax.tree.map(jnp.float32, (phi, theta)), jnp.asarray(step, jnp.int32), 0.99)
    wanted = jax.tree.map(lambda a, b: alpha * a + (1 - alpha) * b, phi, theta)
    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize("theta", [{"a": 1, "b": 1}, {"b": 1}, {}, {"a": {"c": 1}}, {"a": [1]}], ids=str)
def test_ema_update_of_another_tree_raises(theta):
    theta = jax.tree.map(lambda _: jnp.ones(2), theta)
    for phi, other in (({"a": jnp.ones(2)}, theta), (theta, {"a": jnp.ones(2)})):
        with pytest.raises(ValueError):
            equations.ema_update(phi, other, 3, 0.99)


@pytest.mark.parametrize(("phi", "theta"), [((3,), (1,)), ((1,), (3,)), ((), (3,)), ((2, 3), (2, 1))])
def test_ema_update_of_leaves_of_another_shape_raises(phi, theta):
    with pytest.raises(ValueError):
        equations.ema_update({"a": jnp.ones(phi)}, {"a": jnp.ones(theta)}, 3, 0.99)


# --- Eq. (7) ----------------------------------------------------------------------------------------------------------


def supervised(z, y, l_dice=0.5, l_bce=0.5):
    p = sigmoid(z)
    dice = np.mean([1 - (2 * (p[i] * y[i]).sum() + 1) / (p[i].sum() + y[i].sum() + 1) for i in range(len(z))])
    return l_dice * dice + l_bce * bce(z, y).mean()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.2, 3.0)])
def test_supervised_loss(weights):
    found = equations.supervised_loss(Z, Y, lambda_dice=weights[0], lambda_bce=weights[1])
    close(found, supervised(Z, Y, *weights))
    if weights == (0.5, 0.5):
        close(equations.supervised_loss(Z, Y), found)


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_supervised_loss_of_empty_and_full_masks(y):
    y = np.full((2, 6, 6), y)
    for z in (np.full_like(y, 100.0), np.full_like(y, -100.0), np.zeros_like(y)):
        close(equations.supervised_loss(z, y), supervised(z, y), atol=1e-5)
    close(equations.supervised_loss(200 * y - 100, y), 0)  # right and sure


def test_dice_is_averaged_over_images_and_not_pooled():
    """One image right, one with a tiny lesion missed: pooled pixels would hide the miss."""
    y = np.zeros((2, 10, 10))
    y[0], y[1, 0, 0] = 1, 1
    z = np.where(np.arange(2)[:, None, None] == 0, 100.0, -100.0) * np.ones_like(y)
    close(equations.supervised_loss(z, y, lambda_dice=1, lambda_bce=0), (0 + 0.5) / 2)


# --- Eq. (8), (9), ramp -----------------------------------------------------------------------------------------------


def unsupervised(z, mu, p_weak, a, lambda_u=1.0, lambda_c=0.1, distance="cross_entropy", norm="weights"):
    error = lambda_u * (bce(z, mu) if distance == "cross_entropy" else (sigmoid(z) - mu) ** 2)
    error = error + lambda_c * (sigmoid(z) - p_weak) ** 2
    return (a * error).sum() / (max(a.sum(), 1) if norm == "weights" else z.size)


@pytest.mark.parametrize("norm", ["weights", "pixels"])
@pytest.mark.parametrize("distance", ["cross_entropy", "squared"])
@pytest.mark.parametrize("lambdas", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_unsupervised_loss(norm, distance, lambdas):
    settings = dict(lambda_u=lambdas[0], lambda_c=lambdas[1], distance=distance, norm=norm)
    close(equations.unsupervised_loss(Z, MU, P_WEAK, A, **settings), unsupervised(Z, MU, P_WEAK, A, **settings))


def test_squared_distance_of_the_surest_mistake_is_one():
    ones = np.ones((1, 4, 4))
    settings = dict(distance="squared", lambda_c=0.0)
    close(equations.unsupervised_loss(-1e4 * ones, ones, ones, ones, **settings), 1)
    close(equations.unsupervised_loss(1e4 * ones, ones, ones, ones, **settings), 0, atol=0)
    close(equations.unsupervised_loss(Z, sigmoid(Z), P_WEAK, A, **settings), 0)


def test_unsupervised_loss_defaults_to_lambda_1_and_a_tenth():
    wanted = (A * (bce(Z, MU) + 0.1 * (sigmoid(Z) - P_WEAK) ** 2)).sum() / A.sum()
    close(equations.unsupervised_loss(Z, MU, P_WEAK, A), wanted)


def test_unsupervised_loss_cancels_a_uniform_weight_unless_norm_is_pixels():
    by_weights = [equations.unsupervised_loss(Z, MU, P_WEAK, np.full(Z.shape, a)) for a in (1.0, 0.25)]
    by_pixels = [equations.unsupervised_loss(Z, MU, P_WEAK, np.full(Z.shape, a), norm="pixels") for a in (1.0, 0.25)]
    close(by_weights[0], by_weights[1])
    close(by_pixels[0] / 4, by_pixels[1])


def test_unsupervised_loss_limits():
    ones = np.ones((1, 4, 4))
    close(equations.unsupervised_loss(Z, MU, P_WEAK, 0 * A), 0, atol=0)  # nothing kept
    close(equations.unsupervised_loss(100 * ones, ones, ones, ones), 0)  # mu = 1 and p = 1
    close(equations.unsupervised_loss(-100 * ones, 0 * ones, 0 * ones, ones), 0)  # mu = 0 and p = 0
    close(equations.unsupervised_loss(-100 * ones, ones, ones, ones), 100 + 0.1)  # sure and wrong: finite
    close(equations.unsupervised_loss(ones, ones, ones, 0.01 * ones, lambda_c=0), 0.16 * bce(1.0, 1.0))  # sum a < 1


def test_a_pixel_without_weight_gets_no_gradient():
    a = A * (A > 0.5)
    grad = jax.grad(lambda z: equations.unsupervised_loss(z, MU, P_WEAK, a, lambda_c=0.0))(jnp.asarray(Z))
    close(grad, a * (sigmoid(Z) - MU) / a.sum())
    assert not np.asarray(grad)[a == 0].any()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1, 2.5])
def test_ramp_up(share):
    wanted = np.exp(-5 * (1 - min(share, 1)) ** 2)
    close(equations.ramp_up(jnp.asarray(int(share * 400), jnp.int32), 400), wanted)


@pytest.mark.parametrize("step", [0, 1, 500])
@pytest.mark.parametrize("length", [0, 0.0])
def test_ramp_up_of_length_0_is_1_from_the_start(step, length):
    close(equations.ramp_up(jnp.asarray(step, jnp.int32), length), 1, atol=0)


@pytest.mark.parametrize("length", [0, 0.4, 100])
def test_ramp_up_is_0_before_its_start(length):
    """The step is t - wait: labels alone until then, whatever the length."""
    close(equations.ramp_up(jnp.asarray([-1, -1000], jnp.int32), length), [0, 0], atol=0)
    close(equations.ramp_up(jnp.asarray(-0.5), length), 0, atol=0)


def test_ramp_up_rises_inside_and_then_stays():
    found = np.asarray(equations.ramp_up(jnp.arange(0, 61), 40.0))
    close(found[[0, 10, 20, 40, 60]], np.exp(-5 * np.array([1, 0.75, 0.5, 0, 0]) ** 2))
    assert (np.diff(found[:41]) > 0).all() and (found[40:] == 1).all()


def test_total_loss():
    assert equations.total_loss(1.0, 2.0, 3.0, beta=0.5, gamma=0.01) == pytest.approx(1 + 0.5 * 2 + 0.01 * 3)


# --- half precision ---------------------------------------------------------------------------------------------------

M = RNG.uniform(size=(5, 3, 5, 7))
HIDDEN = (RNG.uniform(size=(3, 5)) > 0.5).astype(float)
LOW_ENTROPY = (0.75 + 0.25 * np.exp(-5)) * np.log(2)
# name -> (arguments, ours, formula); 0, 1 and 0 or 1 weights are exact in bfloat16
HALF = {
    "mim_loss": ((MU, P_WEAK, HIDDEN), equations.mim_loss, lambda x, y, hidden: np.abs(x - y)[hidden == 1].mean()),
    "cross_entropy": ((Z, MU), equations.cross_entropy, bce),
    "entropy_loss": ((Z, A), equations.entropy_loss, lambda z, a: (a * entropy(sigmoid(z))).sum() / a.sum()),
    "mean": ((M,), lambda p: equations.mean_and_deviation(p)[0], lambda p: p.mean(0)),
    "deviation": ((M,), lambda p: equations.mean_and_deviation(p)[1], lambda p: p.std(0, ddof=1)),
    "confidence": ((A,), lambda s: equations.confidence(s, 0.1), lambda s: np.exp(-s / 0.1)),
    "keep_certain": ((A,), lambda s: equations.keep_certain(s, 0.501), lambda s: s < 0.501),
    "keep_low_entropy": ((MU,), lambda mu: equations.keep_low_entropy(mu, 0.0), lambda mu: entropy(mu) < LOW_ENTROPY),
    "supervised_loss": ((Z, Y), equations.supervised_loss, supervised),
    "unsupervised_loss": ((Z, MU, P_WEAK, A), equations.unsupervised_loss, unsupervised),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_inputs_are_computed_in_float32(name):
    """Each value is that of the rounded inputs in float32: nothing, sums over pixels least, is taken in bfloat16."""
    inputs, ours, formula = HALF[name]
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    close(ours(*rounded), formula(*(np.asarray(x, np.float64) for x in rounded)))
