"""train.precision=bfloat16: what is rounded, what is not, and that it says and learns nearly the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mira_u_jax import equations, layers, steps

KEY = jax.random.key(0)
PRECISIONS = ("float32", "bfloat16")
INDEX = {"labelled": np.array([0, 1, 2, 3], np.int32), "unlabelled": np.array([2, 5, 8, 11], np.int32)}


def both(tiny_config, name, stage="train"):
    """{precision: the network `name`}."""
    configs = {p: tiny_config(**{"train.precision": p}) for p in PRECISIONS}
    return {p: steps.make_networks((name,), stage, config)[name] for p, config in configs.items()}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(float)


def cosine(one, other):
    return one @ other / np.sqrt((one @ one) * (other @ other))


def compare(loss, nets, params):
    """(losses, gradients) of loss(network, params), each by precision; all of them float32."""
    found = {p: jax.jit(jax.value_and_grad(functools.partial(loss, net)))(params) for p, net in nets.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    return tuple({p: found[p][i] for p in PRECISIONS} for i in range(2))


@pytest.mark.parametrize("name", ["student", "vit"])
def test_logits_and_gradients_are_nearly_those_of_float32(tiny_config, networks, tiny_data, name):
    """With dropout on: the masks are the same."""
    nets, params = both(tiny_config, name), networks[1][name]
    image, mask = (tiny_data[part][:4].astype(np.float32) / 255 for part in ("image", "mask"))
    logits = {p: np.asarray(jax.jit(net)(params, image)) for p, net in nets.items()}
    assert logits["bfloat16"].dtype == np.float32
    gap = np.abs(logits["bfloat16"] - logits["float32"]) / logits["float32"].std()
    assert 0 < gap.mean() < 0.02 and gap.max() < 0.2

    losses, grads = compare(
        lambda network, params: equations.supervised_loss(network(params, image, key=KEY), mask), nets, params
    )
    assert float(losses["bfloat16"]) == pytest.approx(float(losses["float32"]), rel=5e-3)
    assert cosine(*map(flat, grads.values())) > 0.999
    for (path, one), other in zip(*map(jax.tree_util.tree_leaves_with_path, grads.values()), strict=True):
        assert cosine(flat(one), flat(other[1])) > 0.97, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["student", "vit"])
def test_masked_image_modelling_is_nearly_that_of_float32(tiny_config, pretrain_params, tiny_data, name):
    nets, image = both(tiny_config, name, "pretrain"), tiny_data["image"][:4].astype(np.float32) / 255
    loss = lambda network, params: steps.mim(network, params, image, KEY, tiny_config())  # noqa: E731
    losses, grads = compare(loss, nets, pretrain_params[name])
    assert float(losses["bfloat16"]) == pytest.approx(float(losses["float32"]), rel=2e-2)
    assert cosine(*map(flat, grads.values())) > 0.99


# --- what is rounded --------------------------------------------------------------------------------------------------


def operations(jaxpr):
    """Every operation of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from operations(inner)


def types_of(jaxpr, *names):
    """Types of the numbers that the operations of these names read; a sum of one number is none."""
    real = lambda eqn: eqn.primitive.name != "reduce_sum" or eqn.invars[0].aval.size > eqn.outvars[0].aval.size  # noqa: E731
    found = [eqn for eqn in operations(jaxpr) if eqn.primitive.name in names and real(eqn)]
    assert found
    return {str(v.aval.dtype) for eqn in found for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)}


@pytest.mark.parametrize("stage", ["train", "pretrain"])
@pytest.mark.parametrize("name", ["student", "vit"])
def test_every_product_is_bfloat16_and_every_sum_float32(tiny_config, networks, pretrain_params, name, stage):
    params = (networks[1] if stage == "train" else pretrain_params)[name]
    network = both(tiny_config, name, stage)["bfloat16"]
    more = () if stage == "train" else (KEY,)
    result = lambda params, x: network(params, x, *more, key=KEY)  # noqa: E731
    image = jnp.zeros((2, 32, 32, 3))
    jaxpr = jax.make_jaxpr(result)(params, image).jaxpr
    products = [eqn for eqn in operations(jaxpr) if eqn.primitive.name in ("dot_general", "conv_general_dilated")]
    assert {str(v.aval.dtype) for eqn in products for v in eqn.invars} == {"bfloat16"}
    assert types_of(jaxpr, "reduce_sum", "exp", "rsqrt") == {"float32"}
    # The gradient of a bias sums over all pixels of a batch, that of a bias table over all windows.
    backward = jax.make_jaxpr(jax.grad(lambda params: jax.tree.leaves(result(params, image))[0].sum()))(params).jaxpr
    tables = ("scatter-add",) if name == "student" else ()  # in the ViT it moves tokens and sums nothing
    assert types_of(backward, "reduce_sum", *tables) == {"float32"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_ends_in_float32_and_knows_no_bfloat16_unless_asked(tiny_config, networks, tiny_data, precision):
    config = tiny_config(**{"train.precision": precision})
    names = steps.network_names(config)
    tx = steps.make_optimizer(config.optim, names, lambda _: 1e-3)
    step = functools.partial(
        steps.train_step, networks=steps.make_networks(names, "train", config), tx=tx, config=config, steps=30, epoch=3
    )
    state = steps.init_state(networks[1], tx, config.optim)
    jaxpr, (new, measured) = jax.make_jaxpr(step, return_shape=True)(state, tiny_data, INDEX, KEY)
    assert ("bf16" in str(jaxpr)) == (precision == "bfloat16")
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    assert {x.dtype for x in measured.values()} == {jnp.dtype(jnp.float32)}


# --- what is not ------------------------------------------------------------------------------------------------------


def test_norms_of_bfloat16_use_float32_sums():
    """A map far from zero: in bfloat16 its mean square minus its squared mean would be noise."""
    x = jnp.asarray(np.random.default_rng(0).normal(20, 1, (2, 64, 64, 16)), jnp.bfloat16)
    exact = np.asarray(x, float).reshape(2, 64 * 64, 8, 2)
    wanted = (exact - exact.mean((1, 3), keepdims=True)) / exact.std((1, 3), keepdims=True)
    found = layers.GroupNorm(16)(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, float), wanted.reshape(x.shape), atol=0.02)
    norm = nnx.LayerNorm(16, epsilon=1e-5, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = (jnp.asarray(p[...], jnp.bfloat16) for p in (norm.scale, norm.bias))
    exact = np.asarray(x, float)
    wanted = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(norm(x), float), wanted, atol=0.02)


def test_softmax_of_bfloat16_is_float32():
    """Over 4,096 nearly equal keys: sums in bfloat16 would stop at 256."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(0, s, (1, 4096, 1, 8)), jnp.bfloat16) for s in (0.1, 0.1, 1.0))
    v += jnp.bfloat16(2)
    found = np.asarray(layers.attend(q[:, :16], k, v), float)
    q, k, v = (np.asarray(x, float)[0, :, 0] for x in (q[:, :16], k, v))
    weights = np.exp(q @ k.T / 8**0.5)
    np.testing.assert_allclose(found[0, :, 0], weights @ v / weights.sum(-1, keepdims=True), rtol=0.01)
