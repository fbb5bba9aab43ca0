"""train_step against Algorithms 1 and 2 written once more, in float64 NumPy.

The reference takes from the project only what has tests of its own: the networks as functions and their passes, the random
views, the boxes of CutMix. What a method means (who teaches whom, what weighs a pixel, which parts the loss has) it says
for itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mira_u_jax import augment, pseudo, steps
from mira_u_jax.rng import named
from tests import warping

KEY, STEPS, EPOCH = jax.random.key(0), 30, 3
INDEX = {"labelled": np.array([0, 1, 2, 3], np.int32), "unlabelled": np.array([2, 5, 8, 11], np.int32)}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def bce(z, t):
    return t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)


def supervised(z, y, dice, ce):  # Eq. (7)
    p, total = sigmoid(z), 0.0
    for i in range(len(z)):
        total += dice * (1 - (2 * (p[i] * y[i]).sum() + 1) / (p[i].sum() + y[i].sum() + 1)) / len(z)
    return total + ce * bce(z, y).mean()


def unsupervised(z, t, p_w, a, lambda_c, meaning):  # Eq. (8)
    p = sigmoid(z)
    error = ((p - t) ** 2 if meaning["squared"] else bce(z, t)) + lambda_c * (p - p_w) ** 2
    return (a * error).sum() / (a.size if meaning["pixels"] else max(a.sum(), 1))


def masked_image_modelling(rebuilt, hidden, image):  # Eq. (1)
    b, n, values = rebuilt.shape
    side, total = round((values / 3) ** 0.5), 0.0
    for i in range(b):
        for j in np.flatnonzero(hidden[i]):
            row, col = divmod(j, image.shape[2] // side)
            patch = image[i, row * side : (row + 1) * side, col * side : (col + 1) * side]
            total += np.abs(rebuilt[i, j] - patch.reshape(-1)).mean() / hidden.sum()
    return total


def entropy(z, notcut):  # Eq. (3)
    p = np.clip(sigmoid(z), 1e-12, 1 - 1e-12)
    return ((-p * np.log(p) - (1 - p) * np.log(1 - p)) * notcut).sum() / notcut.sum()


# arg of the configuration -> what it means: passes of (vit, student) that are heard, or None for cross teaching; teacher
# "ema" or "online", with dropout or not; w, filter, label; lambda_c, gamma; squared distance; divided by all pixels.
MIRA_U = dict(
    hears=(2, 2), weights="ema", dropout=True, weight=True, keep="sigma", label="mu", lambda_c=0.1, gamma=0.01,
    squared=False, beta=1.0, dice=0.5, ce=0.5, feature=0.0, tau_u=0.15, pixels=False,
)
ONE_PASS = MIRA_U | dict(hears=(0, 1), dropout=False, weight=False, keep="none", lambda_c=0.0, gamma=0.0)
FIXMATCH = ONE_PASS | dict(weights="online", keep="probability", label="hard", pixels=True)
MEANING = {
    "": MIRA_U,
    "teacher=vit": MIRA_U | dict(hears=(4, 0), tau_u=0.05),  # a fresh ViT's passes differ by little
    "ablate=no_uncertainty": MIRA_U | dict(weight=False, keep="none"),
    "ablate=paper_label": MIRA_U | dict(label="paper"),
    "ablate=one_geometry": MIRA_U,
    "method=mean_teacher": ONE_PASS,
    "method=ua_mt": ONE_PASS | dict(hears=(0, 4), dropout=True, keep="entropy", squared=True, beta=0.1),
    "method=fixmatch": FIXMATCH,
    "method=unimatch": FIXMATCH | dict(feature=0.5),
    "method=cross_teaching": ONE_PASS | dict(hears=None, weights="online", label="hard", beta=0.1),
    "method=udamt": ONE_PASS | dict(keep="sigma", tau_u=0.2 / np.sqrt(2)),
    "ablate=alg1": ONE_PASS | dict(hears=(1, 0), gamma=1.0, dice=0.0, ce=0.0),
}
QUICK = ("", "method=cross_teaching")
TAU_P = 0.55  # 0.95 would keep nothing of fresh networks
JOINT = 0.5  # weight of L_MIM in the loop, where it is there


def ingredients(networks, state, data, config, meaning, t):
    """What is random or a network, at step t; traced into one program with the step, so that both share the work."""
    key = jax.random.fold_in(named(KEY, "train"), t)
    image = lambda which: jnp.float32(data["image"])[INDEX[which]] / 255  # noqa: E731
    mask = lambda which: jnp.float32(data["mask"])[INDEX[which]] / 255  # noqa: E731
    x, y = augment.labelled_view(named(key, "labelled"), image("labelled"), mask("labelled"), config.augment)
    x_w, strong, affine, _ = augment.weak_strong_views(
        named(key, "unlabelled"), image("unlabelled"), mask("unlabelled"), config.augment
    )
    made = {"y": y, "x_w": x_w, "p_w": jax.nn.sigmoid(networks["student"](state.params["student"], x_w))}

    weights = state.ema if meaning["weights"] == "ema" else state.params
    hears = meaning["hears"] or (1, 1)
    for name, m in zip(("vit", "student"), hears, strict=True):
        if m and meaning["dropout"]:
            k = named(named(key, "passes"), name)
            made[f"passes_{name}"] = pseudo.teacher_passes(networks[name], weights[name], x_w, k, m)
        elif m:
            made[f"passes_{name}"] = jax.nn.sigmoid(networks[name].outputs(weights[name], x_w))

    pixel = jnp.arange(y.size, dtype=jnp.int32).reshape(y.shape)
    boxes = [augment.cutmix(named(key, f"cutmix/{i}"), 1.0, pixel) for i in range(len(strong))]  # which pixel comes here
    mixed = [x_s.reshape(-1, 3)[box] for (x_s, _), box in zip(strong, boxes, strict=True)]
    made |= {"boxes": boxes, "affine": affine, "notcut": [notcut for _, notcut in strong]}
    made["x"] = jnp.stack([x, *mixed], 1).reshape(-1, *x.shape[1:])  # a labelled image, then the views of its place
    for name in [name for name in networks if not name.endswith("_mim")]:
        made[f"z_{name}"] = networks[name].outputs(state.params[name], made["x"], key=named(key, name))
    for name in [name for name in networks if name.endswith("_mim")]:
        params = state.params[name] | {"encoder": state.params[name.removesuffix("_mim")]["encoder"]}
        k = named(key, name)
        made[f"rebuilt_{name}"] = networks[name](params, x_w, named(k, "hide"), key=named(k, "dropout"))
    if meaning["feature"]:
        made["z_w"] = networks["student"].outputs(state.params["student"], x_w, key=named(key, "feature"), perturb=0.5)
    return made


def pseudo_label(p, share, meaning, kappa):
    """Algorithm 2, lines 5-8, of passes (m, b, h, w): target, w, keep."""
    mu = p.mean(0)
    sigma = p.std(0, ddof=1) if len(p) > 1 else 0 * mu
    w = np.exp(-sigma / kappa) if meaning["weight"] else 1 + 0 * mu
    h = -mu * np.log(mu) - (1 - mu) * np.log(1 - mu)
    keep = {
        "sigma": sigma < meaning["tau_u"], "probability": np.maximum(mu, 1 - mu) > TAU_P, "none": mu > -1,
        "entropy": h < (0.75 + 0.25 * np.exp(-5 * (1 - share) ** 2)) * np.log(2),
    }[meaning["keep"]]
    return {"mu": mu, "hard": 1.0 * (mu > 0.5), "paper": w * mu}[meaning["label"]], w, 1.0 * keep


def warped(value, affine):
    return np.stack([warping.warp(v, a) for v, a in zip(value, affine, strict=True)])


def reference(made, config, meaning, t):
    """{part of the loss: value} of step t, Eq. (9) in "loss"."""
    made = jax.tree.map(lambda v: np.asarray(v, np.float64) if v.dtype == np.float32 else np.asarray(v), made)
    learners = [name for name in ("student", "vit") if f"z_{name}" in made]
    heard = lambda *names: np.concatenate([made[f"passes_{n}"] for n in names if f"passes_{n}" in made])  # noqa: E731
    if meaning["hears"] is None:
        p = {"student": heard("vit"), "vit": heard("student")}
    else:
        p = {name: heard("vit", "student") for name in learners}
    labels = {name: pseudo_label(p[name], t / STEPS, meaning, config.pseudo.kappa) for name in learners}

    def moved(value):  # to where the strong views are, and by the box of each
        there = warped(value, made["affine"])
        return np.concatenate([there.reshape(-1)[box] for box in made["boxes"]])

    notcut = np.concatenate([v.reshape(-1)[box] for v, box in zip(made["notcut"], made["boxes"], strict=True)])
    begun, ramp = t / STEPS - config.loss.wait, config.loss.ramp
    beta = meaning["beta"] * (begun >= 0) * (np.exp(-5 * (1 - min(begun / ramp, 1)) ** 2) if ramp else 1)

    found, total = {}, 0.0
    for name in learners:
        lambda_c, prefix = (meaning["lambda_c"], "loss_") if name == "student" else (0.0, f"loss_{name}_")
        target, w, keep = map(moved, labels[name])
        rest = (lambda_c, meaning)
        parts = []
        every = 1 + len(made["boxes"])
        for z in made[f"z_{name}"]:
            z, z_s = z[::every], np.concatenate([z[view::every] for view in range(1, every)])
            sup = supervised(z, made["y"], meaning["dice"], meaning["ce"])
            unsup = unsupervised(z_s, target, moved(made["p_w"]), w * keep * notcut, *rest)
            parts.append((sup, unsup, entropy(z_s, notcut)))
        sup, unsup, ent = np.mean(parts, 0)
        if name == "student" and meaning["feature"]:  # UniMatch: half from a weak view with half of the channels
            target, w, keep = labels[name]
            unsup = 0.5 * unsup + 0.5 * unsupervised(made["z_w"][0], target, made["p_w"], w * keep, *rest)
        found |= {f"{prefix}sup": sup, f"{prefix}unsup": unsup} | ({"loss_ent": ent} if name == "student" else {})
        total += sup + beta * unsup + (beta * meaning["gamma"] * ent if name == "student" else 0.0)
    for name in [name for name in made if name.startswith("rebuilt_")]:  # Algorithm 1: L_MIM in the same sum
        part = f"loss_{name.removeprefix('rebuilt_')}"
        found[part] = masked_image_modelling(*made[name], made["x_w"])
        total += JOINT * found[part]
    return found | {"loss": total, "beta": beta}


@pytest.mark.parametrize("arg", [pytest.param(a, marks=[] if a in QUICK else pytest.mark.slow) for a in MEANING])
def test_step_equals_the_algorithms(tiny_config, tiny_data, networks, arg):
    """At a step in the middle, where beta is neither 0 nor 1, with phi far from theta, so that a mix-up of them shows."""
    special = {"ablate=alg1": {"mim.joint_weight": JOINT}, "teacher=vit": {"pseudo.tau_u": 0.05}}.get(arg, {})
    config = tiny_config(arg, **{"pseudo.tau_p": TAU_P, "augment.cutmix": 1.0}, **special)
    names, meaning, t = steps.network_names(config), MEANING[arg], 7
    if config.student.outputs == 1 and not config.mim.joint_weight:
        params = {name: networks[1][name] for name in names}
    else:
        params = steps.init_params(names, "train", config, KEY)
    nets = steps.make_networks(names, "train", config)
    tx = steps.make_optimizer(config.optim, names, lambda _: 1e-3)
    state = steps.init_state(params, tx, config.optim)
    noise = jax.tree.map(lambda p: p + 0.3 * np.random.default_rng(p.size).normal(size=p.shape) * abs(p), state.ema)
    state = state.replace(step=state.step + t, ema=jax.tree.map(np.float32, noise))

    @jax.jit
    def both(state):  # the step's gradients are not asked for, so XLA leaves them out
        measured = steps.train_step(
            state, tiny_data, INDEX, KEY, networks=nets, tx=tx, config=config, steps=STEPS, epoch=EPOCH
        )[1]
        measured = {k: v for k, v in measured.items() if k.startswith("loss") or k in ("beta", "keep", "w")}
        return measured, ingredients(nets, state, tiny_data, config, meaning, t)

    found, made = jax.device_get(both(state))
    wanted = reference(made, config, meaning, t)
    if "keep" in found:
        assert 0.01 < found.pop("keep") < 0.99  # the filter is alive, so that the comparison sees it
    assert (found.pop("w") < 0.95) == meaning["weight"]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, rel=2e-4, abs=1e-6), name


def test_gradients_are_those_of_constant_labels(tiny_config, tiny_data, networks):
    """The norms the step reports equal those of closed-form dL/dz, with mu, w, keep and p_w as constants, pulled back.

    A gradient that leaks through a pseudo-label or through p_w, or a head that gets none, would change them.
    """
    config, t = tiny_config(**{"augment.cutmix": 1.0, "loss.lambda_c": 1.0, "teacher.weights": "online"}), 7
    meaning, (nets, params) = MEANING[""] | {"lambda_c": 1.0, "weights": "online"}, networks
    tx = steps.make_optimizer(config.optim, nets, lambda _: 1e-3)
    state = steps.init_state(params, tx, config.optim)
    state = state.replace(step=state.step + t)
    step = dict(networks=nets, tx=tx, config=config, steps=STEPS, epoch=EPOCH)

    @jax.jit
    def both(state):
        measured = steps.train_step(state, tiny_data, INDEX, KEY, **step)[1]
        return {k: v for k, v in measured.items() if k.startswith("grad_")}, ingredients(
            nets, state, tiny_data, config, meaning, t
        )

    found, made = jax.device_get(both(state))
    label = pseudo_label(np.concatenate([made["passes_vit"], made["passes_student"]]), t / STEPS, meaning, 0.1)
    box = made["boxes"][0]
    there = [warped(v, made["affine"]) for v in (*label, made["p_w"])]
    target, w, keep, p_w, notcut = (v.reshape(-1)[box] for v in (*there, made["notcut"][0]))
    a, y, beta = w * keep * notcut, made["y"], np.exp(-5 * (1 - t / STEPS / config.loss.ramp) ** 2)

    def slope(z, lambda_c, gamma):  # dL/dz of Eq. (9)
        z, z_s = z[0, ::2], z[0, 1::2]
        p, q = sigmoid(z), sigmoid(z_s)
        size = (p.sum((1, 2)) + y.sum((1, 2)) + 1)[:, None, None]
        overlap = (2 * (p * y).sum((1, 2)) + 1)[:, None, None]
        sup = -(2 * y * size - overlap) / size**2 * p * (1 - p) / len(z) / 2 + (p - y) / z.size / 2
        unsup = a * ((q - target) + 2 * lambda_c * (q - p_w) * q * (1 - q)) / a.sum()
        unsup = beta * (unsup - gamma * z_s * q * (1 - q) * notcut / notcut.sum())
        return np.stack([sup, unsup], 1).reshape(1, -1, *z.shape[1:])

    @jax.jit
    def pull_back(params, slopes):
        key = jax.random.fold_in(named(KEY, "train"), t)
        heads = lambda name: lambda p: nets[name].outputs(p, made["x"], key=named(key, name))  # noqa: E731
        grads = {name: jax.vjp(heads(name), params[name])[1](slopes[name])[0] for name in slopes}
        return {f"grad_{name}": optax.global_norm(grad) for name, grad in grads.items()}

    slopes = {"student": slope(made["z_student"], 1.0, 0.01), "vit": slope(made["z_vit"], 0.0, 0.0)}
    wanted = pull_back(params, jax.tree.map(np.float32, slopes))
    for name in ("grad_student", "grad_vit"):
        assert float(found[name]) == pytest.approx(float(wanted[name]), rel=1e-3), name


@pytest.mark.slow
def test_joint_masked_image_modelling_reaches_the_encoder(tiny_config, tiny_data):
    """With every other loss off: the ViT's encoder, and through it theta, learns from L_MIM alone."""
    off = {"loss.beta": 1e-9, "loss.lambda_dice": 0.0, "loss.lambda_bce": 0.0}
    config = tiny_config("ablate=alg1", **off)
    names = steps.network_names(config)
    nets, params = steps.make_networks(names, "train", config), steps.init_params(names, "train", config, KEY)
    tx = steps.make_optimizer(config.optim, names, lambda _: 1e-3)
    step = dict(networks=nets, tx=tx, config=config, steps=STEPS, epoch=EPOCH)
    norm = jax.jit(lambda state: steps.train_step(state, tiny_data, INDEX, KEY, **step)[1]["grad_vit"])
    assert norm(steps.init_state(params, tx, config.optim)) > 1e-3
