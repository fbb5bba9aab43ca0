"""Student, teacher and their masked autoencoders: shapes, what hidden pixels may reach, no dead parameter, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import isic
from mira_u_jax import config as configuration
from mira_u_jax import equations, steps, teacher

RNG = np.random.default_rng(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["student", "vit"])
@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 64, 64), (1, 32, 96), (1, 64, 32)])
def test_logits_have_the_shape_of_the_image(networks, name, shape):
    nets, params = networks
    for image in (jnp.float32, jnp.bfloat16):
        out = jax.eval_shape(nets[name], params[name], jax.ShapeDtypeStruct((*shape, 3), image))
        assert (out.shape, out.dtype) == (shape, jnp.float32)


def test_every_parameter_gets_a_gradient(networks, reached_bias_rows):
    """From Eq. (7) alone at 32 px. Excepted: rows of relative_bias whose offset a map under 8 cells cannot hold (the 4x4
    and 2x2 maps of stages 3 and 4, the 4x4 of skip 3): these are exactly 0."""
    nets, params = networks
    image = RNG.uniform(size=(2, 32, 32, 3)).astype(np.float32)
    mask = np.zeros((2, 32, 32), np.float32)
    mask[:, 8:20, 4:24] = 1
    loss = lambda params: sum(equations.supervised_loss(nets[n](params[n], image), mask) for n in nets)  # noqa: E731
    grads, leaves = jax.jit(jax.grad(loss))(params), 0
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        reached = reached_bias_rows(name, 32)
        grad = np.abs(np.asarray(grad))
        if reached is not None:
            assert not grad[~reached].any(), name
            assert (grad[reached].max(1) > 0).all(), name
            assert reached.all() == ("[2]" in name), name  # 8x8: the whole table is alive
        assert grad.max() > 1e-6, name
        leaves += 1
    assert leaves == len(jax.tree.leaves(params)) > 60


# --- masked image modelling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "ratio"), [(64, 0.75), (16, 0.75), (4, 0.75), (4, 0.99), (4, 0.01), (2, 0.5), (10, 0.33)])
def test_exactly_hidden_count_patches_are_hidden(n, ratio):
    wanted = min(max(round(n * ratio), 1), n - 1)  # something to rebuild, something to see
    assert teacher.hidden_count(n, ratio) == wanted
    hidden = np.asarray(teacher.hidden_patches(jax.random.key(0), 50, n, ratio))
    assert set(np.unique(hidden)) == {0, 1}
    assert (hidden.sum(1) == wanted).all()
    assert (hidden.max(0) == 1).all()  # any patch may be
    assert (hidden.min(0) == 0).all()
    assert (hidden != hidden[:1]).any()  # each image has its own


def test_to_patches_runs_row_by_row():
    image = RNG.uniform(size=(2, 8, 12, 3)).astype(np.float32)
    patches = np.asarray(teacher.to_patches(image, 4))
    assert patches.shape == (2, 6, 48)
    for n in range(6):
        top, left = 4 * (n // 3), 4 * (n % 3)
        np.testing.assert_array_equal(patches[:, n].reshape(2, 4, 4, 3), image[:, top : top + 4, left : left + 4])


@pytest.fixture(scope="module")
def autoencoders(tiny_config, pretrain_params):
    """{name: (patch, compiled network(image, key))} of stage "pretrain", dropout off."""
    config = tiny_config()
    names = ("student", "vit")
    nets = steps.make_networks(names, "pretrain", config)
    bind = lambda name: jax.jit(lambda image, key: nets[name](pretrain_params[name], image, key))  # noqa: E731
    return {"student": (16, bind("student")), "vit": (config.vit.patch, bind("vit"))}


@pytest.mark.parametrize("name", ["student", "vit"])
def test_hidden_pixels_do_not_matter_and_visible_ones_do(autoencoders, name):
    patch, network = autoencoders[name]
    image, key = RNG.uniform(size=(2, 32, 32, 3)).astype(np.float32), jax.random.key(1)
    rebuilt, hidden = network(image, key)
    n = (32 // patch) ** 2
    assert rebuilt.shape == (2, n, patch * patch * 3) and rebuilt.dtype == jnp.float32
    assert (hidden.sum(1) == round(0.75 * n)).all()
    # Patch n of `hidden` is the n-th of to_patches: paint by a route of its own.
    where = np.asarray(hidden).reshape(2, 32 // patch, 32 // patch).repeat(patch, 1).repeat(patch, 2)[..., None]
    noise = RNG.uniform(size=image.shape).astype(np.float32)
    np.testing.assert_array_equal(network(np.where(where == 1, noise, image), key)[0], rebuilt)
    assert np.abs(network(np.where(where == 0, noise, image), key)[0] - rebuilt).max() > 1e-3


@pytest.mark.parametrize("name", ["student", "vit"])
def test_the_mask_is_a_function_of_the_key(autoencoders, name):
    _, network = autoencoders[name]
    image = RNG.uniform(size=(8, 32, 32, 3)).astype(np.float32)[:2]
    masks = [np.asarray(network(image, jax.random.key(k))[1]) for k in (0, 0, 1, 2)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any() or (masks[0] != masks[3]).any()


def test_each_visible_token_returns_to_its_place():
    """Without a block no token meets another: a changed pixel may change its own patch's reconstruction only."""
    rngs = nnx.Rngs(0)
    vit = teacher.Teacher(patch=4, channels=8, depth=0, heads=2, hidden=8, head_channels=8, dropout=0.0, rngs=rngs)
    mae = teacher.MaskedAutoencoder(vit, ratio=0.5, channels=8, depth=0, heads=2, rngs=rngs)
    image = RNG.uniform(size=(1, 12, 16, 3)).astype(np.float32)
    changed = np.repeat(image, 12, 0)  # image n has another patch n; the same key hides other patches of each
    for n in range(12):
        top, left = 4 * (n // 4), 4 * (n % 4)
        changed[n, top : top + 4, left : left + 4] = RNG.uniform(size=(4, 4, 3))
    before, hidden = mae(np.repeat(image, 12, 0), jax.random.key(0))
    difference = np.abs(np.asarray(mae(changed, jax.random.key(0))[0] - before)).max(-1)  # image, patch
    np.testing.assert_array_equal(difference > 1e-6, np.eye(12, dtype=bool) & (np.asarray(hidden) == 0))


# --- size -------------------------------------------------------------------------------------------------------------


def test_parameter_counts_of_the_full_preset():
    """Pinned: a change of the architecture must be meant, and docs name these figures."""
    config = configuration.check(isic.get_config("preset=full"))
    params = steps.abstract_params(config)
    assert {name: count(tree) for name, tree in params.items()} == {"student": 7_525_493, "vit": 2_426_673}
    encoder = params["vit"]["encoder"]
    # By hand from section 3.1.1, 4 layers of width 256 and hidden 512: attention, MLP, two norms; then embedding and norm.
    block = 4 * (256 * 256 + 256) + 2 * 256 * 512 + 512 + 256 + 4 * 256
    assert count(encoder) == 4 * block + (8 * 8 * 3 + 1) * 256 + 2 * 256
