"""Layers and whole networks against an independent PyTorch implementation: outputs, input and parameter gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

from benchmarks import torch_networks as peer  # noqa: E402
from mira_u_jax import layers  # noqa: E402
from mira_u_jax.student import Student  # noqa: E402

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def full_precision():
    """An accelerator would multiply float32 in fewer bits than the peer does."""
    with jax.default_matmul_precision("highest"):
        yield


def drawn(params, rng):
    """Every leaf drawn anew, so that no zero bias or unit scale hides a mistake; kernels keep the size of a signal."""

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return noise / np.float32(np.prod(leaf.shape[:-1])) ** 0.5
        return {"scale": 1 + 0.3 * noise, "bias": 0.3 * noise, "relative_bias": noise}[name]

    return jax.tree_util.tree_map_with_path(draw, params)


def pure(kind, *args, **kwargs):
    """(function of (params, *inputs), shapes of params) of a flax module; nothing is drawn."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: kind(*args, **kwargs, rngs=nnx.Rngs(0))))
    return lambda params, *inputs: nnx.merge(graphdef, params)(*inputs), nnx.to_pure_dict(params)


def close(found, wanted, name):
    """Within TOLERANCE of the leaf's largest value, or of 1 where an output or an input gradient is small."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape, name
    floor = 0 if name.startswith("parameter") else 1
    limit = TOLERANCE * max(np.abs(wanted).max(), floor)
    assert np.abs(found - wanted).max() <= limit, f"{name}: {np.abs(found - wanted).max()} > {limit}"


def agree(function, params, module, *inputs, channels_first=True, seed=0):
    """Both networks with the same drawn weights give the same output and gradients. Inputs are channels-last."""
    rng = np.random.default_rng(seed)
    params = drawn(params, rng)
    out_shape = jax.eval_shape(function, params, *inputs).shape
    weights = rng.normal(size=out_shape).astype(np.float32)  # of the outputs in the sum that is differentiated

    @jax.jit
    def ours(params, inputs):
        out, pull = jax.vjp(function, params, *inputs)
        return out, *pull(weights)

    out, param_grads, *input_grads = ours(params, inputs)
    peer.load(module, params).eval()
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    swap = channels_first and inputs[0].ndim == 4
    found = module(*(x.movedim(-1, 1) if swap else x for x in leaves))
    found = found.movedim(1, -1) if swap and found.ndim == 4 else found
    found.backward(torch.tensor(weights))

    close(out, found.detach(), "output")
    for i, (grad, leaf) in enumerate(zip(input_grads, leaves, strict=True)):
        close(grad, leaf.grad, f"gradient of input {i}")
    wanted = peer.flat(peer.unload(module, "grad"))
    param_grads = peer.flat(param_grads)
    assert param_grads.keys() == wanted.keys()
    for path, grad in param_grads.items():
        close(grad, wanted[path], f"parameter {path}")


def normal(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.5), (0.005, 0.0)])  # the small one makes epsilon count
def test_group_norm(scale, mean):
    ours = pure(lambda rngs: layers.GroupNorm(16))
    agree(*ours, torch.nn.GroupNorm(8, 16), np.float32(scale) * normal(2, 5, 7, 16) + np.float32(mean))


def test_conv_transpose():
    module = torch.nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
    agree(*pure(layers.ConvTranspose, 6, 4), module, normal(2, 4, 5, 6))


def test_conv_block():
    agree(*pure(layers.ConvBlock, 16), peer.ConvBlock(16), normal(2, 6, 9, 16))


def test_transformer_block():
    """A small input, so that the LayerNorm's epsilon counts."""
    module = peer.TransformerBlock(12, peer.Attention(12, 3), 20)
    agree(*pure(layers.TransformerBlock, 12, 3, 20, dropout=0.1), module, 0.01 * normal(2, 7, 12))


# 12 x 20 is padded; shifted over 9 x 24 a whole band is padding; 5 x 16 is one window by two.
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (8, 8), (4, 4), (9, 24), (5, 16)])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention(size, shifted):
    ours = pure(layers.WindowAttention, 8, 2, 8, shifted=shifted)
    agree(*ours, peer.WindowAttention(8, 2, 8, shifted=shifted), normal(2, *size, 8), channels_first=False)


def test_swin_pair():  # small inputs again
    ours = pure(layers.SwinPair, 8, 2, 8, mlp_ratio=3, dropout=0.1)
    agree(*ours, peer.SwinPair(8, 2, 8, mlp_ratio=3), 0.01 * normal(2, 12, 20, 8))


@pytest.mark.parametrize("size", [(16, 8), (12, 20)])
def test_cross_skip(size):
    decoder, encoder = normal(2, 2, *size, 8)
    agree(*pure(layers.CrossSkip, 8, 2, 8), peer.CrossSkip(8, 2, 8), decoder, encoder)


def test_gate_skip():
    decoder, encoder = normal(2, 2, 5, 6, 8)
    agree(*pure(layers.GateSkip, 8), peer.GateSkip(8), decoder, encoder)


# --- networks ---------------------------------------------------------------------------------------------------------


def image(b, h, w):
    return np.random.default_rng(2).uniform(size=(b, h, w, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def smoke(networks, tiny_config):
    """smoke(name): (network, params, torch module) of the smoke configuration."""
    (nets, params), config = networks, tiny_config()
    make = {"student": lambda: peer.Student(**config.student), "vit": lambda: peer.Teacher(**config.vit)}
    return lambda name: (nets[name], params[name], make[name]())


@pytest.mark.parametrize("name", ["student", "vit"])
@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 64, 96)])
def test_network(smoke, name, shape):
    agree(*smoke(name), image(*shape))


def test_student_whose_windows_are_padded_and_shifted():
    """Odd windows, shifted over maps of 20 x 32 and 10 x 16 cells; heads differ by width; the bottleneck is conv."""
    shape = dict(
        widths=(8, 16, 24, 8), stages=("conv", "swin", "swin", "conv"), skips=("gate", "cross", "cross"), window=5,
        head_width=8, mlp_ratio=3, dropout=0.1,
    )
    agree(*pure(Student, **shape), peer.Student(**shape), image(1, 40, 64))


# --- carrying weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["student", "vit"])
def test_unload_gives_back_what_load_took(smoke, name):
    _, params, module = smoke(name)
    params = drawn(params, np.random.default_rng(3))
    back = peer.unload(peer.load(module, params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    chex.assert_trees_all_equal(back, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["norm1"].pop("bias"), "missing.*norm1.*bias.*left over \\[\\]"),
        (lambda tree: tree["conv1"].update(bias=jnp.zeros(8)), "missing \\[\\], left over.*conv1.*bias"),
        (lambda tree: tree["norm2"].update(scale=jnp.ones(1)), "missing.*norm2.*scale.*left over.*norm2.*scale"),
    ],
)
def test_load_refuses_a_tree_that_does_not_fit(change, message):
    tree = drawn(pure(layers.ConvBlock, 8)[1], np.random.default_rng(0))
    peer.load(peer.ConvBlock(8), tree)
    change(tree)
    with pytest.raises(ValueError, match=message):
        peer.load(peer.ConvBlock(8), tree)


def test_unload_refuses_a_missing_gradient():
    with pytest.raises(ValueError, match="no gradient"):
        peer.unload(peer.ConvBlock(8), "grad")
