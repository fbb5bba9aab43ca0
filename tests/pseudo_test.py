"""Pseudo-labels: who hears whom, what passes the filter, and the report on them, against loops over pixels in NumPy."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mira_u_jax import equations, pseudo, steps

KEY = jax.random.key(0)
SHAPE = (2, 9, 11)


class Noisy:
    """A network whose logits are its parameters, (k, b, h, w) for k heads, plus noise of a key."""

    def outputs(self, params, image, *, key=None):
        shape = (params.shape[0], *image.shape[:3])
        return jnp.broadcast_to(params, shape) + (0 if key is None else jax.random.normal(key, shape))


@pytest.fixture
def noisy():
    """noisy(config): the pseudo-labels of two Noisy networks on images of 4 x 5; theta and phi differ."""

    def labels(config, share=0.5, bias=(-0.5, 0.5)):
        names = [name for name in pseudo.LEARNERS if name in steps.network_names(config)]
        phi = {name: jnp.full((1, 1, 1, 1), b) for name, b in zip(pseudo.LEARNERS, bias, strict=True)}
        state = types.SimpleNamespace(ema=phi, params=jax.tree.map(lambda x: x + 3, phi))
        return pseudo.pseudo_labels(
            state, jnp.zeros((2, 4, 5, 3)), KEY, networks={name: Noisy() for name in names}, config=config, share=share
        )

    return labels


# --- who hears whom ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2, 3, 8, 9])
def test_passes_for_each_source(passes):
    for learner in pseudo.LEARNERS:
        assert pseudo.passes_for(learner, "vit", passes) == {"vit": passes}
        assert pseudo.passes_for(learner, "ema", passes) == {"student": passes}
        both = pseudo.passes_for(learner, "both", passes)
        assert both == {"vit": (passes + 1) // 2, "student": passes // 2}  # the ViT has the odd one
        assert sum(both.values()) == passes
    assert pseudo.passes_for("student", "cross", passes) == {"vit": passes}
    assert pseudo.passes_for("vit", "cross", passes) == {"student": passes}


@pytest.mark.parametrize(
    ("arg", "shared"), [("", True), ("teacher=vit", True), ("method=cross_teaching", False)]
)
def test_learners_that_hear_the_same_passes_share_one_label(tiny_config, noisy, arg, shared):
    """The very same object, so the passes are not even traced twice."""
    labels = noisy(tiny_config(arg))
    assert set(labels) == {"student", "vit"}
    assert (labels["student"] is labels["vit"]) == shared


@pytest.mark.parametrize("name", pseudo.LEARNERS)
def test_passes_in_groups_are_the_same_and_need_less_memory(networks, tiny_data, name):
    """8 passes by 3: the last group is smaller."""
    network, params = networks[0][name], networks[1][name]
    image = tiny_data["image"][:2].astype(np.float32) / 255
    passes = functools.partial(pseudo.teacher_passes, network, passes=8)
    made = {k: jax.jit(functools.partial(passes, chunk=k)).lower(params, image, KEY).compile() for k in (0, 3)}
    together, grouped = (np.asarray(program(params, image, KEY)) for program in made.values())
    np.testing.assert_allclose(grouped, together, atol=1e-5)
    assert together.std(0).mean() > 1e-4
    together, grouped = (program.memory_analysis().temp_size_in_bytes for program in made.values())
    assert grouped < 0.7 * together


@pytest.mark.parametrize("arg", ["teacher=ema", "method=mean_teacher", "method=fixmatch", "method=udamt"])
def test_a_vit_that_nobody_reads_has_no_label(tiny_config, noisy, arg):
    assert set(noisy(tiny_config(arg))) == {"student"}


def test_each_network_of_a_source_makes_its_share_of_the_passes(tiny_config, noisy):
    """A ViT that says 1 and a student that says 0: mu is the ViT's share, 2 of 3 passes."""
    for arg, wanted in (("", 2 / 3), ("teacher=vit", 1), ("teacher=ema", 0)):
        label = noisy(tiny_config(arg, **{"teacher.passes": 3}), bias=(-100, 100))["student"]
        np.testing.assert_allclose(label.mu, np.full((2, 4, 5), wanted), atol=1e-6)


def test_cross_teaching_gives_each_learner_the_other_network(tiny_config, networks, tiny_data):
    """Both hear theta, without dropout: one hard label a pixel, every pixel equal."""
    config = tiny_config("method=cross_teaching")
    nets, params = networks
    image = tiny_data["image"][:2].astype(np.float32) / 255

    @jax.jit
    def both(theta):
        state = types.SimpleNamespace(params=theta, ema=None)  # phi is not read
        labels = pseudo.pseudo_labels(state, image, KEY, networks=nets, config=config, share=0.5)
        return labels, {name: jax.nn.sigmoid(nets[name](theta[name], image)) for name in nets}

    # A random network may say more than 1/2 everywhere: its last bias is moved, so that hard labels have both sides.
    middle = {name: np.median(p) for name, p in both(params)[1].items()}
    bias = {name: np.full(1, np.log((1 - p) / p), np.float32) for name, p in middle.items()}
    theta = {name: params[name] | {"out": params[name]["out"] | {"bias": bias[name]}} for name in nets}
    labels, p = jax.device_get(both(theta))
    assert np.abs(p["student"] - p["vit"]).max() > 0.01
    for learner, other in (("student", "vit"), ("vit", "student")):
        label = labels[learner]
        np.testing.assert_allclose(label.mu, p[other], atol=1e-6)
        np.testing.assert_array_equal(label.target, label.mu > 0.5)
        assert 0 < label.target.mean() < 1
        assert not label.sigma.any() and (label.w == 1).all() and (label.keep == 1).all()


def test_two_heads_teach_where_they_differ_by_less_than_a_fifth(tiny_config, networks, tiny_data):
    """UDAMT: mu is their mean, sigma = |p1 - p2| / sqrt 2, and the threshold of sigma is that of the difference."""
    config = tiny_config("method=udamt")
    network = steps.make_networks(("student",), "train", config)["student"]
    params = networks[1]["student"]
    out = {"kernel": 4 * params["out"]["kernel"], "bias": params["out"]["bias"]}  # surer heads differ more
    # The auxiliary head is the last stage without its skip: with the weights of that stage it says something else.
    params = params | {"out": out, "auxiliary": {"up": params["up"][0], "block": params["decoder"][0], "out": out}}
    image = tiny_data["image"][:2].astype(np.float32) / 255

    @jax.jit
    def both(phi):
        state = types.SimpleNamespace(ema={"student": phi}, params=None)  # theta is not read
        labels = pseudo.pseudo_labels(state, image, KEY, networks={"student": network}, config=config, share=0.5)
        return labels["student"], jax.nn.sigmoid(network.outputs(phi, image))

    label, p = jax.device_get(both(params))
    p = p.astype(float)
    difference = np.abs(p[0] - p[1])
    np.testing.assert_allclose(label.mu, p.mean(0), atol=1e-6)
    np.testing.assert_allclose(label.sigma, difference / np.sqrt(2), atol=1e-6)
    np.testing.assert_array_equal(label.target, label.mu)
    clear = np.abs(difference - 0.2) > 1e-5
    np.testing.assert_array_equal(label.keep[clear], (difference < 0.2)[clear])
    assert 0.05 < label.keep.mean() < 0.95  # both sides of the threshold were met
    assert (label.w == 1).all()


# --- target and filter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["confidence", "none"])
def test_targets_and_weights_are_what_the_configuration_says(tiny_config, noisy, weight):
    make = lambda label: noisy(tiny_config(**{  # noqa: E731
        "pseudo.label": label, "pseudo.weight": weight, "pseudo.kappa": 0.3, "pseudo.tau_u": 0.2, "teacher.passes": 5,
    }))["student"]
    found = {name: make(name) for name in ("mu", "hard", "paper")}
    mu, sigma = (np.asarray(x, float) for x in (found["mu"].mu, found["mu"].sigma))
    w = np.exp(-sigma / 0.3) if weight == "confidence" else np.ones_like(mu)
    assert sigma.min() > 0.01 and 0 < (mu > 0.5).mean() < 1
    for name, wanted in {"mu": mu, "hard": (mu > 0.5).astype(float), "paper": w * mu}.items():
        label = found[name]
        np.testing.assert_allclose(label.target, wanted, atol=1e-6)
        np.testing.assert_array_equal(label.mu, found["mu"].mu)  # the target alone changes
        np.testing.assert_allclose(label.w, w, atol=1e-6)
        np.testing.assert_array_equal(label.keep, sigma < 0.2)


@pytest.mark.parametrize("filter", ["sigma", "probability", "entropy", "none"])
def test_keep_is_the_filter_of_the_configuration(tiny_config, filter):
    cfg = tiny_config(**{"pseudo.filter": filter, "pseudo.tau_u": 0.2, "pseudo.tau_p": 0.8}).pseudo
    rng = np.random.default_rng(0)
    mu, sigma = rng.uniform(size=SHAPE), rng.uniform(0, 0.5, SHAPE)
    low = -mu * np.log(mu) - (1 - mu) * np.log(1 - mu) < (0.75 + 0.25 * np.exp(-5 * 0.7**2)) * np.log(2)
    wanted = {"sigma": sigma < 0.2, "probability": (mu > 0.8) | (mu < 0.2), "entropy": low, "none": mu > -1}[filter]
    found = pseudo.keep(jnp.float32(mu), jnp.float32(sigma), cfg, 0.3)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == jnp.float32


def test_the_entropy_filter_opens_with_the_share_of_the_stage(tiny_config, noisy):
    config = tiny_config("method=ua_mt")
    kept = {}
    for share in (0.0, 0.5, 1.0):
        label = noisy(config, share=share)["student"]
        mu = np.asarray(label.mu, float)
        entropy = -mu * np.log(mu) - (1 - mu) * np.log(1 - mu)
        wanted = entropy < (0.75 + 0.25 * np.exp(-5 * (1 - share) ** 2)) * np.log(2)
        np.testing.assert_array_equal(label.keep, wanted)
        kept[share] = wanted.mean()
    assert 0 < kept[0.0] < kept[0.5] < kept[1.0] == 1
    sigma = [noisy(tiny_config(), share=share)["student"].keep for share in (0.0, 1.0)]
    np.testing.assert_array_equal(*sigma)  # the filter on sigma does not move


# --- report -----------------------------------------------------------------------------------------------------------


def pixels():
    return np.ndindex(SHAPE)


def wanted_band(p):
    """By hand: the 5 x 5 around a pixel, cut at the border, holds p > .5 and p <= .5."""
    band = np.zeros(SHAPE)
    for b, i, j in pixels():
        around = p[b, max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3] > 0.5
        band[b, i, j] = around.any() and not around.all()
    return band


def wanted_dice(p, truth):
    both = sum(1 for at in np.ndindex(p.shape) if p[at] > 0.5 and truth[at])
    return (2 * both + 1) / ((p > 0.5).sum() + truth.sum() + 1)


def wanted_ece(p, truth, where):
    """Ten bins of equal width: share of the pixels times |mean probability - share of lesion|."""
    bins = [[] for _ in range(10)]
    for at in pixels():
        if where[at]:
            bins[min(int(p[at] * np.float32(10)), 9)].append((float(p[at]), truth[at]))
    total = sum(len(b) for b in bins)
    return sum(len(b) / total * abs(np.mean([p for p, _ in b]) - np.mean([t for _, t in b])) for b in bins if b)


def drawn(seed, smooth):
    """A label, p_w and truth; `smooth`: one blob an image, so that there is an inside, an outside and a band."""
    rng = np.random.default_rng(seed)
    mu, p_w, truth = rng.uniform(size=(3, *SHAPE)).astype(np.float32)
    if smooth:
        inside = np.hypot(*(np.mgrid[: SHAPE[1], : SHAPE[2]] - np.array([3, 3])[:, None, None])) < 2.5
        mu = np.where(inside, 0.5 + mu / 2, mu / 2).astype(np.float32)
    mu[0, 0, :3] = 0, 1, 0.5  # bins are closed below, and 1 is in the last
    sigma, w = rng.uniform(size=(2, *SHAPE)).astype(np.float32)
    keep = (rng.uniform(size=SHAPE) > 0.3).astype(np.float32)
    return pseudo.PseudoLabel(mu, sigma, w, keep, mu), p_w, truth


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_report_equals_loops_over_the_pixels(seed, smooth):
    label, p_w, shares = drawn(seed, smooth)
    found = jax.device_get(jax.jit(lambda label: pseudo.report(label, p_w, shares, filtered=True))(label))
    truth, band, keep = shares > 0.5, wanted_band(label.mu), label.keep.astype(bool)
    assert 0 < band.mean() < 1 or not smooth
    wanted = {
        "sigma": label.sigma.mean(), "sigma_outline": label.sigma[band == 1].mean(),
        "w": label.w.mean(), "w_outline": label.w[band == 1].mean(), "keep": label.keep.mean(),
        "teacher_dice": np.mean([wanted_dice(label.mu[b], truth[b]) for b in range(SHAPE[0])]),
        "student_dice": np.mean([wanted_dice(p_w[b], truth[b]) for b in range(SHAPE[0])]),
    }
    for name, where in (("kept", keep), ("dropped", ~keep)):
        wanted[f"{name}_dice"] = wanted_dice(label.mu[where], truth[where])  # one Dice of all these pixels
        wanted[f"{name}_ece"] = wanted_ece(label.mu, truth, where)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == np.float32 and found[name].shape == (), name
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("size", [3, 5])
def test_near_outline_is_a_band_on_both_sides_of_the_outline(size):
    p = np.zeros((1, 12, 12), np.float32)
    p[0, :, 6:] = 1
    reach = size // 2
    wanted = np.zeros_like(p)
    wanted[0, :, 6 - reach : 6 + reach] = 1
    np.testing.assert_array_equal(pseudo.near_outline(p, size), wanted)
    for value in (0.0, 0.5, 1.0):  # one class alone has no outline, not even at the border of the image
        assert not np.asarray(pseudo.near_outline(np.full_like(p, value), size)).any()


def test_mean_where_of_nothing_is_nan():
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    where = (x > 0.3).astype(np.float32)
    np.testing.assert_allclose(pseudo.mean_where(x, where), x[x > 0.3].mean(), rtol=1e-5)
    assert np.isnan(pseudo.mean_where(x, 0 * where))


@pytest.mark.parametrize(("kept", "none"), [(1, "dropped"), (0, "kept")])
def test_what_no_pixel_has_is_nan_and_not_a_number_that_a_mean_would_take(kept, none):
    label, p_w, truth = drawn(0, smooth=True)
    found = jax.device_get(pseudo.report(label.replace(keep=np.full(SHAPE, kept, np.float32)), p_w, truth, filtered=True))
    assert {name for name, value in found.items() if np.isnan(value)} == {f"{none}_dice", f"{none}_ece"}
    assert found["keep"] == kept


def test_a_report_without_filter_says_nothing_of_kept_pixels():
    label, p_w, truth = drawn(0, smooth=True)
    found = pseudo.report(label, p_w, truth, filtered=False)
    assert set(found) == {"sigma", "sigma_outline", "w", "w_outline", "teacher_dice", "student_dice"}
    filtered = pseudo.report(label, p_w, truth, filtered=True)
    assert all(found[name] == filtered[name] for name in found)


def test_report_of_images_without_lesion_has_no_band():
    """Nothing there and nothing found is a Dice of 1."""
    empty = np.zeros(SHAPE, np.float32)
    label = pseudo.PseudoLabel(empty, empty, empty + 1, empty + 1, empty)
    found = pseudo.report(label, empty, empty, filtered=False)
    assert found["teacher_dice"] == found["student_dice"] == 1
    assert {name for name, value in found.items() if np.isnan(value)} == {"sigma_outline", "w_outline"}


def test_calibration_error_of_a_calibrated_and_of_a_sure_and_wrong_label():
    truth = np.tile([1.0, 0, 0, 0], 25).reshape(1, 10, 10)
    ones = np.ones_like(truth)
    np.testing.assert_allclose(pseudo.calibration_error(0.25 * ones, truth, ones), 0, atol=1e-6)
    np.testing.assert_allclose(pseudo.calibration_error(1 - truth, truth, ones), 1, atol=1e-6)
    # Bins do not cancel: .2 too low in one and .2 too high in another is .2 and not 0.
    p, truth = equations.f32([[[0.2, 0.2, 0.8, 0.8]]]), np.array([[[0.0, 0, 1, 1]]])
    np.testing.assert_allclose(pseudo.calibration_error(p, truth, np.ones_like(truth)), 0.2, atol=1e-6)
