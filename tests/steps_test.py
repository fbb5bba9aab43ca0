"""The steps at smoke size, 32 px: what may influence what, and that everything moves. Few step variants are compiled."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mira_u_jax import equations, pseudo, steps

KEY = jax.random.key(0)
INDEX = {"labelled": np.array([0, 1, 2, 3], np.int32), "unlabelled": np.array([2, 5, 8, 11], np.int32)}


def leaves(tree):
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def assert_equal(one, other):
    chex.assert_trees_all_equal(one, other)


def differs(one, other):
    return any((a != b).any() for (_, a), (_, b) in zip(leaves(one), leaves(other), strict=True))


class Case:
    """One method, compiled once: step(state, data, index, key) -> (state, metrics), and its state at step 0."""

    def __init__(self, config, params, stage="train", names=None):
        self.config, self.names = config, names or steps.network_names(config)
        self.networks = steps.make_networks(self.names, stage, config)
        schedule = steps.make_schedule(config.optim, 30, lr=3e-3, schedule="cosine")
        self.tx = steps.make_optimizer(config.optim, self.names, schedule)
        theta = {name: params[name] for name in self.names}
        self.state = steps.init_state(theta, self.tx, config.optim, averaged=stage == "train")
        parts = dict(networks=self.networks, tx=self.tx, config=config)
        if stage == "train":
            self.step = jax.jit(functools.partial(steps.train_step, steps=30, epoch=3, **parts))
        else:
            self.step = jax.jit(functools.partial(steps.pretrain_step, **parts))


@pytest.fixture(scope="module")
def mira_u(tiny_config, networks):
    return Case(tiny_config(), networks[1])


@pytest.fixture(scope="module")
def supervised(tiny_config, networks):
    return Case(tiny_config("method=supervised"), networks[1])


@pytest.fixture(scope="module")
def warm(mira_u, tiny_data):
    """The state after the first step, whose learning rate is 0: from here on parameters move."""
    return mira_u.step(mira_u.state, tiny_data, INDEX, KEY)[0]


@pytest.fixture(scope="module")
def second(mira_u, warm, tiny_data):
    return mira_u.step(warm, tiny_data, INDEX, KEY)


# --- 2., 3. the teacher ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["student", "vit"])
def test_teacher_passes_equal_a_loop_with_the_same_keys(networks, tiny_data, name):
    """The vmapped form is one image and one key at a time, key = fold_in(fold_in(key, example), pass)."""
    network, params = networks[0][name], networks[1][name]
    image = tiny_data["image"][:2].astype(np.float32) / 255
    found = jax.jit(lambda p: pseudo.teacher_passes(network, p, image, KEY, 3))(params)
    assert found.shape == (3, 2, 32, 32) and found.dtype == jnp.float32
    one = jax.jit(lambda image, key: jax.nn.sigmoid(network(params, image[None], key=key)[0]))
    for i in range(2):
        for m in range(3):
            wanted = one(image[i], jax.random.fold_in(jax.random.fold_in(KEY, i), m))
            np.testing.assert_allclose(found[m, i], wanted, atol=1e-5)
    assert np.asarray(found).std(0, ddof=1).mean() > 1e-4  # dropout is alive: passes differ


@pytest.mark.parametrize(("source", "weights"), [("both", "ema"), ("ema", "online")])
def test_pseudo_labels_carry_no_gradient(tiny_config, networks, tiny_data, source, weights):
    """Not even with weights=online, where the teacher's parameters are the ones that are trained."""
    config = tiny_config(**{"teacher.source": source, "teacher.weights": weights})
    case = Case(config, networks[1])
    image = tiny_data["image"][:2].astype(np.float32) / 255

    def loss(params):
        state = case.state.replace(params=params, ema=params)
        labels = pseudo.pseudo_labels(state, image, KEY, networks=case.networks, config=config, share=0.5)
        return sum(part.sum() for part in jax.tree.leaves(labels))

    assert not any(leaf.any() for _, leaf in leaves(jax.jit(jax.grad(loss))(case.state.params)))


def student_label(state, image, networks, config, share=0.5):
    """mu, sigma, w, keep that the student hears."""
    label = pseudo.pseudo_labels(state, image, KEY, networks=networks, config=config, share=share)["student"]
    return label.mu, label.sigma, label.w, label.keep


def test_pseudo_labels_are_eqs_4_and_5_of_the_shared_passes(tiny_config, networks, tiny_data):
    """source=both: half the passes of each network, from phi and not from theta; then w and keep as configured."""
    config = tiny_config(**{"teacher.passes": 3, "pseudo.kappa": 0.2, "pseudo.tau_u": 0.08})
    nets, params = networks
    image = tiny_data["image"][:2].astype(np.float32) / 255
    state = Case(config, jax.tree.map(np.zeros_like, params)).state  # theta, all zero, is not read

    @jax.jit
    def both(params):
        found = student_label(state.replace(ema=params), image, nets, config)
        shares = (("vit", 2), ("student", 1))
        return found, [pseudo.teacher_passes(nets[n], params[n], image, steps.named(KEY, n), m) for n, m in shares]

    (mu, sigma, w, keep), passes = jax.device_get(both(params))
    passes = np.concatenate(passes).astype(float)
    np.testing.assert_allclose(mu, passes.mean(0), atol=1e-5)
    np.testing.assert_allclose(sigma, passes.std(0, ddof=1), atol=1e-5)
    np.testing.assert_allclose(w, np.exp(-sigma / 0.2), atol=1e-5)
    np.testing.assert_array_equal(keep, sigma < np.float32(0.08))


def test_fixmatch_keeps_what_it_is_sure_of(tiny_config, networks, tiny_data):
    config = tiny_config("method=fixmatch", **{"pseudo.tau_p": 0.6})
    case = Case(config, networks[1])
    image = tiny_data["image"][:2].astype(np.float32) / 255
    state = case.state.replace(ema=jax.tree.map(np.zeros_like, case.state.ema))  # phi is not read

    @jax.jit
    def both(params):
        found = student_label(state.replace(params=params), image, case.networks, config)
        return found, jax.nn.sigmoid(case.networks["student"](params["student"], image))

    (mu, sigma, w, keep), p = jax.device_get(both(state.params))
    np.testing.assert_allclose(mu, p, atol=1e-5)
    assert not sigma.any() and (w == 1).all()
    np.testing.assert_array_equal(keep, (mu > 0.6) | (mu < 0.4))


# --- the whole step ---------------------------------------------------------------------------------------------------


def test_first_step_reports_its_parts(mira_u, tiny_data):
    state, m = mira_u.step(mira_u.state, tiny_data, INDEX, KEY)
    assert all(np.isfinite(v) and v.dtype == jnp.float32 and v.shape == () for v in m.values()), m
    assert int(state.step) == 1
    assert m["beta"] == pytest.approx(np.exp(-5), rel=1e-5)
    beta, gamma = float(m["beta"]), 0.01 * float(m["beta"])
    student = m["loss_sup"] + beta * m["loss_unsup"] + gamma * m["loss_ent"]  # Eq. (9)
    assert float(m["loss"]) == pytest.approx(float(student + m["loss_vit_sup"] + beta * m["loss_vit_unsup"]), rel=1e-5)
    assert m["sigma"] > 1e-3  # dropout and two networks disagree
    assert 0 < m["keep"] <= 1 and 0 < m["w"] < 1
    assert m["grad_student"] > 0 and m["grad_vit"] > 0


def test_a_step_changes_every_leaf_and_phi_is_their_average(warm, second, reached_bias_rows):
    """relative_bias changes where the map has the offset; of the other rows there is nothing to learn."""
    state = second[0]
    phi = dict(leaves(state.ema))
    for (name, before), (_, after), (_, averaged) in zip(
        leaves(warm.params), leaves(state.params), leaves(warm.ema), strict=True
    ):
        reached = reached_bias_rows(name, 32)
        if reached is not None:
            assert (before != after)[reached].any(1).all(), name
            np.testing.assert_array_equal(before[~reached], after[~reached])
        assert (before != after).any(), name
        assert (averaged != phi[name]).any(), name
        np.testing.assert_allclose(phi[name], 0.5 * averaged + 0.5 * after, atol=1e-7, err_msg=name)  # t = 1: alpha 1/2
    assert_equal(state.ema, equations.ema_update(warm.ema, state.params, 1, 0.999))


def test_masks_of_unlabelled_images_never_reach_the_parameters(mira_u, warm, second, tiny_data):
    """Image 2 is labelled and in the unlabelled batch; every other mask becomes noise: only the report changes."""
    mask = np.random.default_rng(1).integers(0, 256, tiny_data["mask"].shape, np.uint8)
    mask[INDEX["labelled"]] = tiny_data["mask"][INDEX["labelled"]]
    state, m = mira_u.step(warm, tiny_data | {"mask": mask}, INDEX, KEY)
    assert_equal(state, second[0])
    assert m["loss"] == second[1]["loss"]
    assert m["teacher_dice"] != second[1]["teacher_dice"]  # the report did see them
    mask[0] = 255 - mask[0]
    assert differs(mira_u.step(warm, tiny_data | {"mask": mask}, INDEX, KEY)[0].params, state.params)


def test_unlabelled_images_do_reach_the_parameters(mira_u, warm, second, tiny_data):
    image = tiny_data["image"].copy()
    image[11] = 255 - image[11]
    assert differs(mira_u.step(warm, tiny_data | {"image": image}, INDEX, KEY)[0].params, second[0].params)


def test_a_step_is_a_function_of_its_inputs_and_of_the_step_number(mira_u, warm, second, tiny_data):
    state, m = mira_u.step(warm, tiny_data, INDEX, KEY)
    assert_equal((state, m), second)
    # Another step number or key: other augmentation and dropout, so another loss of the same parameters.
    for other_state, key in ((warm.replace(step=warm.step + 1), KEY), (warm, jax.random.key(1))):
        other = mira_u.step(other_state, tiny_data, INDEX, key)[1]
        assert other["loss_sup"] != m["loss_sup"] and other["loss_vit_sup"] != m["loss_vit_sup"]
        assert other["sigma"] != m["sigma"]


def test_plateau_scale_multiplies_the_step(mira_u, warm, second, tiny_data):
    halved = warm.replace(plateau=warm.plateau._replace(scale=jnp.float32(0.5)))
    state, _ = mira_u.step(halved, tiny_data, INDEX, KEY)
    for before, full, half in zip(*map(jax.tree.leaves, (warm.params, second[0].params, state.params)), strict=True):
        np.testing.assert_allclose(half - before, (full - before) / 2, atol=1e-6)


# --- supervised -------------------------------------------------------------------------------------------------------


def test_supervised_has_no_vit_and_reads_the_labelled_images_only(supervised, tiny_data):
    assert set(supervised.state.params) == {"student"}
    index = {"labelled": INDEX["labelled"]}  # there is no unlabelled index to read
    state = supervised.step(supervised.state, tiny_data, index, KEY)[0]
    state, m = supervised.step(state, tiny_data, index, KEY)
    assert differs(state.params, supervised.state.params)
    assert m["loss"] == m["loss_sup"] and "loss_unsup" not in m and "sigma" not in m
    others = np.setdiff1d(np.arange(12), INDEX["labelled"])
    rng = np.random.default_rng(1)
    noise = {name: value.copy() for name, value in tiny_data.items()}
    for value in noise.values():
        value[others] = rng.integers(0, 256, value[others].shape)
    again = supervised.step(supervised.state, noise, index, KEY)[0]
    assert_equal(supervised.step(again, noise, index, KEY), (state, m))


def test_methods_share_the_labelled_augmentation(mira_u, supervised, tiny_data):
    """A pair of methods differs in the method alone: the same labelled view, so much the same supervised loss at step 0."""
    ours = mira_u.step(mira_u.state, tiny_data, INDEX, KEY)[1]
    theirs = supervised.step(supervised.state, tiny_data, {"labelled": INDEX["labelled"]}, KEY)[1]
    assert float(ours["loss_sup"]) == pytest.approx(float(theirs["loss_sup"]), abs=0.02)  # dropout draws differ
    assert theirs["beta"] == 0


@pytest.mark.parametrize(
    ("arg", "names"),
    [("", {"student", "vit"}), ("teacher=vit", {"student", "vit"}), ("teacher=ema", {"student"}),
     ("method=supervised", {"student"}), ("method=mean_teacher", {"student"}), ("method=fixmatch", {"student"})],
)
def test_theta_holds_only_what_is_read(tiny_config, arg, names):
    config = tiny_config(arg)
    assert set(steps.network_names(config)) == set(steps.abstract_params(config)) == names


# --- optimiser --------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tiny_config):
    """(optimiser at a constant rate of .1, two small networks of one shape)."""
    rng = np.random.default_rng(0)
    one = lambda: {"a": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2), "scale": rng.normal(size=2)},  # noqa: E731
                   "relative_bias": rng.normal(size=4)}
    params = jax.tree.map(jnp.float32, {"student": one(), "vit": one()})
    return steps.make_optimizer(tiny_config().optim, ("student", "vit"), lambda _: 0.1), params


def test_gradients_are_clipped_per_network(toy):
    """In the SECOND step: in the first, Adam divides any scale out and a joint clip would not show."""
    tx, params = toy

    @jax.jit
    def second_update(student, vit):
        grads = {"student": params["student"], "vit": params["vit"]}
        _, opt = tx.update(grads, tx.init(params), params)
        grads = {name: jax.tree.map(lambda g, s=s: s * g[..., ::-1], params[name])
                 for name, s in (("student", student), ("vit", vit))}
        return tx.update(grads, opt, params)[0]

    once, loud_vit, loud = second_update(1, 1), second_update(1, 1000), second_update(1000, 1)
    assert_equal(once["student"], loud_vit["student"])
    assert optax.tree.norm(params["student"]) > 1  # so that the clip acts:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), once["student"], loud["student"])
    quiet = second_update(1e-3, 1)  # while a gradient under the threshold is left alone
    assert differs(quiet["student"], once["student"])


def test_phi_may_move_every_few_steps_only(toy):
    """As in Algorithm 1, once an epoch: t of Eq. (6) counts those moves, so the first copies theta and the second halves."""
    tx, params = toy
    optim = types.SimpleNamespace(plateau=types.SimpleNamespace(factor=0.5, patience=1, cooldown=0, min_scale=0.01))
    state = steps.init_state(jax.tree.map(lambda x: x, params), tx, optim)
    grads = jax.tree.map(jnp.ones_like, params)
    move = jax.jit(lambda state: steps.average(steps.update(state, grads, tx)[0], 0.9, 3))
    states = [state]
    for _ in range(6):
        states.append(move(states[-1]))
    for t in (1, 2, 4, 5):
        assert_equal(states[t].ema, states[t - 1].ema)
        assert differs(states[t].params, states[t - 1].params)
    assert_equal(states[3].ema, states[3].params)
    half = jax.tree.map(lambda a, b: (a + b) / 2, states[3].params, states[6].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), states[6].ema, half)


def test_weight_decay_touches_kernels_only(toy, tiny_config):
    tx, params = toy
    decay = tiny_config().optim.weight_decay
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for (name, update), (_, value) in zip(leaves(updates), leaves(params), strict=True):
        wanted = -0.1 * decay * value if "'kernel'" in name else 0 * value
        np.testing.assert_allclose(update, wanted, rtol=1e-5, err_msg=name)


def test_schedules(tiny_config):
    optim = tiny_config(**{"optim.warmup": 0.1}).optim
    cosine = steps.make_schedule(optim, 100, lr=0.5, schedule="cosine")
    assert [float(cosine(t)) for t in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.25, 0.5, 0.25, 0], abs=1e-6)
    plateau = steps.make_schedule(optim, 100, lr=0.5, schedule="plateau")
    assert [float(plateau(t)) for t in (0, 5, 10, 99)] == pytest.approx([0, 0.25, 0.5, 0.5])


def test_plateau_waits_for_its_patience(tiny_config):
    """As PyTorch's ReduceLROnPlateau: `patience` bad validations are forgiven, the next one cuts."""
    config = tiny_config(**{"optim.plateau.patience": 2})
    transform, scales = steps.make_plateau(config.optim), []
    state = transform.init({})
    for value in [0.5, 0.4, 0.4, 0.4, 0.4, 0.4]:
        _, state = transform.update({}, state, value=np.float32(value))
        scales.append(float(state.scale))
    assert scales == [1, 1, 1, 1, 0.5, 0.5]


# --- pretraining, evaluation ------------------------------------------------------------------------------------------


def test_pretraining_lowers_its_loss_and_reads_no_mask(tiny_config, pretrain_params, tiny_data):
    config = tiny_config()
    names = ("student", "vit")
    case = Case(config, pretrain_params, stage="pretrain", names=names)
    state, losses, index = case.state, [], {"unlabelled": INDEX["labelled"]}
    for _ in range(20):
        state, m = case.step(state, tiny_data, index, KEY)
        losses.append([m["mim_student"], m["mim_vit"]])
        assert float(m["loss"]) == pytest.approx(float(m["mim_student"] + m["mim_vit"]), rel=1e-5)
        assert state.ema == {}  # nobody reads an average of this stage
    losses = np.array(losses)
    assert (losses[-5:].mean(0) < 0.7 * losses[:5].mean(0)).all(), losses
    noise = tiny_data | {"mask": 255 - tiny_data["mask"]}
    assert_equal(case.step(state, noise, index, KEY), case.step(state, tiny_data, index, KEY))


def test_grey_modelling_sees_luma_only(tiny_config):
    """Two images of equal luma and different colour are one image to it; to the usual kind they are two."""
    rng = np.random.default_rng(0)
    image = rng.uniform(0.3, 0.6, (2, 8, 8, 3)).astype(np.float32)
    other = image + rng.uniform(0, 0.2, (2, 8, 8, 1)).astype(np.float32) * np.array([1.0, -0.299 / 0.587, 0], np.float32)
    seen = []

    def blind(params, image, hide, key):  # a network that rebuilds black
        seen.append(image)
        return jnp.zeros((2, 4, 48)), jnp.ones((2, 4))

    for grey in (True, False):
        config = tiny_config(**{"mim.grey": grey})
        losses = [float(steps.mim(blind, None, x, KEY, config)) for x in (image, other)]
        assert (losses[0] == pytest.approx(losses[1], abs=1e-6)) == grey
        np.testing.assert_allclose(losses[0], np.abs(seen[-2]).mean(), rtol=1e-5)
        assert (np.ptp(np.asarray(seen[-1]), axis=-1).max() < 1e-6) == grey


def test_encoders_of_both_stages_have_one_tree(tiny_config):
    """The loop moves params[name]["encoder"] from one stage to the next."""
    config = tiny_config()
    make = lambda stage: jax.eval_shape(  # noqa: E731
        functools.partial(steps.fresh_params, ("student", "vit"), stage, config), KEY
    )
    for name in ("student", "vit"):
        shapes = [jax.tree.map(lambda leaf: leaf.shape, make(stage)[name]["encoder"]) for stage in ("pretrain", "train")]
        assert shapes[0] == shapes[1]


def test_networks_do_not_share_their_initial_numbers(networks, tiny_config):
    """phi starts as a copy that shares no buffer with theta; another seed draws other numbers."""
    config = tiny_config()
    state = Case(config, networks[1]).state
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()
    other = steps.init_params(("student", "vit"), "train", config, jax.random.key(1))
    for (name, a), (_, b) in zip(leaves(networks[1]), leaves(other), strict=True):
        assert a.shape == b.shape
        if "'kernel'" in name or "relative_bias" in name:
            assert (a != b).all(), name


def test_eval_step_is_the_network_without_dropout(networks, tiny_data):
    nets, params = networks
    run = jax.jit(functools.partial(steps.eval_step, network=nets["student"]))
    found = run(params["student"], tiny_data["image"][:4])
    assert found.shape == (4, 32, 32) and found.dtype == jnp.float32
    np.testing.assert_array_equal(found, run(params["student"], tiny_data["image"][:4]))
    turned = run(params["student"], tiny_data["image"][:4][::-1])
    np.testing.assert_allclose(found[::-1], turned, atol=1e-4)  # no image sees another one
