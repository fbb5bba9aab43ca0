"""Layers against naive NumPy, and against PyTorch where it is installed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mira_u_jax import layers

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def close(found, wanted, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-4, atol=atol)


def randomised(module):
    """The module with every parameter drawn anew, so that no zero bias or unit scale hides a mistake."""
    graphdef, params = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(0.5 * normal(*p.shape)), params))


# --- normalisation, convolution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_equals_flax(groups):
    ours = randomised(layers.GroupNorm(8, groups=groups))
    flax = nnx.GroupNorm(8, num_groups=groups, epsilon=1e-5, rngs=nnx.Rngs(0))
    flax.scale[...], flax.bias[...] = ours.scale[...], ours.bias[...]
    x = 3 * normal(2, 5, 7, 8) + 4
    close(ours(x), flax(x))


def test_group_norm_of_a_constant_map_is_its_bias():
    norm = randomised(layers.GroupNorm(8))
    close(norm(jnp.full((1, 4, 4, 8), 3.0)), np.broadcast_to(norm.bias[...], (1, 4, 4, 8)))


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="12"):
        layers.GroupNorm(12)


def test_conv_transpose_equals_the_definition():
    """y[2i - 1 + k] += x[i] kernel[k] along each axis, cut to twice the size."""
    module = randomised(layers.ConvTranspose(3, 2, rngs=nnx.Rngs(0)))
    kernel, x = np.asarray(module.kernel[...]), normal(2, 4, 5, 3)
    wanted = np.zeros((2, 8, 10, 2)) + np.asarray(module.bias[...])
    for i, j, p, q in itertools.product(range(4), range(5), range(3), range(3)):
        row, col = 2 * i - 1 + p, 2 * j - 1 + q
        if 0 <= row < 8 and 0 <= col < 10:
            wanted[:, row, col] += x[:, i, j] @ kernel[p, q]
    close(module(x), wanted)


def test_conv_transpose_equals_torch():
    torch = pytest.importorskip("torch")
    module, x = randomised(layers.ConvTranspose(3, 2, rngs=nnx.Rngs(0))), normal(2, 4, 5, 3)
    peer = torch.nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1)
    with torch.no_grad():
        peer.weight[:] = torch.tensor(np.asarray(module.kernel[...]).transpose(2, 3, 0, 1))
        peer.bias[:] = torch.tensor(np.asarray(module.bias[...]))
        wanted = peer(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    close(module(x), wanted)


@pytest.mark.parametrize("shape", [(6, 3), (2, 5, 3), (2, 4, 5, 3)])
def test_linear_equals_flax_with_its_gradients(shape):
    ours, x = randomised(layers.Linear(3, 4, rngs=nnx.Rngs(0))), normal(*shape)
    flax = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    flax.kernel[...], flax.bias[...] = ours.kernel[...], ours.bias[...]
    weights = normal(*shape[:-1], 4)

    def gradients(module, batched):
        graphdef, params = nnx.split(module)

        def loss(params, x):
            module = nnx.merge(graphdef, params)
            return (weights * jnp.sin(jax.vmap(module)(x) if batched else module(x))).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    wanted = gradients(flax, batched=False)
    for batched in (False, True):
        jax.tree.map(close, gradients(ours, batched), wanted)


# --- attention --------------------------------------------------------------------------------------------------------


def by_heads(module, x, context):
    """Queries, keys and values, (b, heads, tokens, d), from the module's weights in NumPy."""
    linear = lambda layer, y: y @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])  # noqa: E731
    key, value = np.split(linear(module.key_value, context), 2, axis=-1)
    split = lambda y: y.reshape(*y.shape[:2], module.heads, -1).transpose(0, 2, 1, 3)  # noqa: E731
    return split(linear(module.query, x)), split(key), split(value), lambda y: linear(module.out, y)


def joined(y):  # b heads n d -> b n (heads d)
    return np.asarray(y).transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


@pytest.fixture(scope="module")
def attention_case():
    module = randomised(layers.Attention(8, 2, rngs=nnx.Rngs(0)))
    return module, normal(3, 5, 8), normal(3, 7, 8), normal(1, 2, 5, 7)  # x, context, bias


def test_attention_equals_the_formula(attention_case):
    module, x, context, bias = attention_case
    q, k, v, out = by_heads(module, x, context)
    weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(4) + bias)
    close(module(x, context, bias=bias), out(joined(weights / weights.sum(-1, keepdims=True) @ v)))


def test_attention_equals_torch(attention_case):
    torch = pytest.importorskip("torch")
    module, x, context, bias = attention_case
    *qkv, out = by_heads(module, x, context)
    attend = torch.nn.functional.scaled_dot_product_attention
    close(module(x, context, bias=bias), out(joined(attend(*map(torch.tensor, qkv), attn_mask=torch.tensor(bias)))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attend_equals_the_function_of_jax(dtype):
    q, k, v = (jnp.asarray(normal(2, n, 3, 4), dtype) for n in (5, 7, 7))
    bias = jnp.asarray(np.where(normal(2, 3, 5, 7) > 1.5, layers.MASKED, 30 * normal(2, 3, 5, 7)), jnp.float32)
    found, wanted = layers.attend(q, k, v, bias), jax.nn.dot_product_attention(q, k, v, bias=bias.astype(dtype))
    assert found.dtype == dtype and found.shape == wanted.shape
    atol = 1e-5 if dtype == jnp.float32 else 0.1  # jax rounds the bias too
    np.testing.assert_allclose(np.float32(found), np.float32(wanted), atol=atol)


def test_self_attention_is_attention_to_itself(attention_case):
    module, x, _, _ = attention_case
    close(module(x), module(x, x), atol=0)


def test_attention_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="heads"):
        layers.Attention(8, 3, rngs=nnx.Rngs(0))


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window_attention():
    """make(shifted): window 8, 2 heads, the same random weights whether shifted or not."""
    params = nnx.split(randomised(layers.WindowAttention(8, 2, 8, rngs=nnx.Rngs(0))))[1]

    def make(shifted):
        return nnx.merge(nnx.split(layers.WindowAttention(8, 2, 8, shifted=shifted, rngs=nnx.Rngs(0)))[0], params)

    return make


def swin_reach(h, w, shifted, window=8):
    """Which cells meet, (hw, hw) bool, from the Swin paper: pad to windows, shift cyclically, 3 x 3 regions by slices."""
    axes = []
    for length in (h, w):
        if length <= window:  # one window, no shift
            axes.append(np.zeros(length, int))
            continue
        padded = -(-length // window) * window
        shift = window // 2 if shifted else 0
        region = np.zeros(padded, int)
        if shifted:
            for label, part in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                region[part] = label
        place = (np.arange(length) - shift) % padded  # where a real cell lies after the shift
        axes.append(10 * (place // window) + region[place])
    group = (100 * axes[0][:, None] + axes[1][None]).reshape(-1)
    return group[:, None] == group[None]


@pytest.mark.parametrize(
    ("h", "w", "shifted"),
    [(16, 16, False), (16, 16, True), (12, 20, False), (12, 20, True), (4, 4, True), (8, 8, True), (8, 16, True)],
)
def test_a_cell_reaches_its_window_and_region_exactly(window_attention, h, w, shifted):
    module = nnx.jit(window_attention(shifted))
    x = 0.2 * normal(h, w, 8)  # small, so that no softmax saturates and every cell is heard
    changed = np.tile(x, (h * w, 1, 1, 1))
    changed.reshape(h * w, h * w, 8)[np.arange(h * w), np.arange(h * w)] += np.sign(normal(h * w, 8))
    difference = np.abs(np.asarray(module(changed)) - np.asarray(module(x[None]))).max(-1).reshape(h * w, h * w)
    wanted = swin_reach(h, w, shifted)
    assert difference[~wanted].max(initial=0) < 1e-6
    assert difference[wanted].min() > 1e-5
    # A map that fits into one window must not be split by a shift.
    assert wanted.all() == (h <= 8 and w <= 8)


@pytest.mark.parametrize(("h", "w"), [(16, 16), (12, 20), (5, 9), (4, 4)])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_constant_map_stays_constant(window_attention, h, w, shifted):
    """Every value is the same, so any mean of them is; a padded key (value 0) would show at the border."""
    module, cell = window_attention(shifted), normal(8)
    wanted = module.attention(jnp.asarray(cell)[None, None])[0, 0]
    close(module(jnp.tile(cell, (2, h, w, 1))), np.broadcast_to(wanted, (2, h, w, 8)))


def test_a_padded_window_equals_its_real_cells_alone(window_attention):
    x = normal(1, 12, 20, 8)
    whole, module = window_attention(False)(x), window_attention(False)
    close(whole[:, 8:, 16:], module(x[:, 8:, 16:]))
    close(whole[:, :8, 16:], module(x[:, :8, 16:]))


def test_a_map_of_one_window_is_not_shifted(window_attention):
    x = normal(2, 8, 8, 8)
    close(window_attention(True)(x), window_attention(False)(x), atol=0)


def test_cross_attention_takes_queries_from_x_and_values_from_the_same_window_of_context(window_attention):
    module, x, context = window_attention(False), normal(1, 16, 16, 8), normal(1, 16, 16, 8)
    found = module(x, context)
    close(found[:, 8:, :8], module(x[:, 8:, :8], context[:, 8:, :8]))
    close(module(x, x), module(x))
    assert np.abs(found - module(context, x)).max() > 1e-3


@pytest.mark.parametrize(("wh", "ww"), [(8, 8), (4, 4), (4, 8)])
def test_relative_index_depends_on_the_offset_only(wh, ww):
    index = layers.relative_index(wh, ww, 8)
    cells = list(itertools.product(range(wh), range(ww)))
    row_of = {}
    for (n, a), (m, b) in itertools.product(enumerate(cells), repeat=2):
        assert row_of.setdefault((a[0] - b[0], a[1] - b[1]), index[n, m]) == index[n, m]
    assert len(set(row_of.values())) == len(row_of) == (2 * wh - 1) * (2 * ww - 1)  # another offset, another row
    assert index.min() >= 0 and index.max() < 15 * 15
    # The same offset is the same row whatever the map: weights keep their meaning at another size.
    assert index[0, 0] == layers.relative_index(8, 8, 8)[0, 0]


def test_relative_bias_points_where_its_offset_says():
    """A large bias for offset (query - key) = (1, -2) makes each cell copy the value one row up and two columns right."""
    module = layers.WindowAttention(4, 1, 8, rngs=nnx.Rngs(0))
    module.relative_bias[...] = jnp.zeros((225, 1)).at[(1 + 7) * 15 + (-2 + 7)].set(1e4)
    x = normal(1, 8, 8, 4)
    value = x @ np.asarray(module.attention.key_value.kernel[...])[:, 4:] @ np.asarray(module.attention.out.kernel[...])
    close(module(x)[:, 1:, :-2], value[:, :-1, 2:])


# --- positions, dropout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [(8, 8), (32, 32), (2, 6)])
def test_positions_are_distinct_and_bounded(h, w):
    code = layers.sincos_positions(h, w, 32)
    assert code.shape == (h * w, 32) and code.dtype == np.float32 and np.abs(code).max() <= 1
    distance = np.linalg.norm(code[:, None] - code[None], axis=-1) + 9 * np.eye(h * w)
    assert distance.min() > 0.5
    # Half codes the row, half the column: cells of one row share the first half.
    grid = code.reshape(h, w, 32)
    close(grid[:, :1, :16] - grid[:, :, :16], np.zeros((h, w, 16)), atol=0)
    close(grid[:1, :, 16:] - grid[:, :, 16:], np.zeros((h, w, 16)), atol=0)


BLOCKS = {
    "transformer": (lambda: layers.TransformerBlock(8, 2, 16, dropout=0.5, rngs=nnx.Rngs(0)), (2, 5, 8)),
    "conv": (lambda: layers.ConvBlock(8, dropout=0.5, rngs=nnx.Rngs(0)), (2, 4, 4, 8)),
    "swin": (lambda: layers.SwinPair(8, 2, 4, mlp_ratio=2, dropout=0.5, rngs=nnx.Rngs(0)), (2, 8, 8, 8)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_dropout_is_off_without_rngs_and_a_function_of_its_key(name):
    make, shape = BLOCKS[name]
    module, x = make(), normal(*shape)
    call = lambda key: np.asarray(module(x, rngs=nnx.Rngs(dropout=jax.random.key(key))))  # noqa: E731
    still, first = np.asarray(module(x)), call(0)
    assert (np.asarray(module(x)) == still).all()
    assert (call(0) == first).all()
    assert np.abs(call(1) - first).max() > 1e-3
    assert np.abs(still - first).max() > 1e-3
    assert np.abs(first[0] - still[0]).max() > 1e-3 and np.abs(first[1] - still[1]).max() > 1e-3  # every example


@pytest.mark.parametrize(("rate", "rounded"), [(0.25, 64 / 256), (0.1, 26 / 256), (0.001, 1 / 256)])
def test_dropout_keeps_the_expectation(rate, rounded):
    dropped = np.asarray(layers.Dropout(rate)(jnp.ones((200, 202)), rngs=nnx.Rngs(dropout=jax.random.key(0))))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / (1 - rounded))}
    assert (dropped == 0).mean() == pytest.approx(rounded, abs=4 * (rounded / 40_000) ** 0.5)
    for a, b in ((dropped[:, :-1], dropped[:, 1:]), (dropped[:-1], dropped[1:])):  # neighbours share a word, not a draw
        together = ((a == 0) & (b == 0)).mean()
        assert together == pytest.approx(rounded**2, abs=4 * (rounded**2 / 40_000) ** 0.5 + 1e-5)


def test_dropout_of_whole_maps_and_of_nothing():
    x, rngs = jnp.ones((8, 3, 5, 16)), nnx.Rngs(dropout=jax.random.key(1))
    dropped = np.asarray(layers.Dropout(0.5, whole_maps=True)(x, rngs=rngs))
    assert (dropped == dropped[:, :1, :1]).all() and set(np.unique(dropped)) == {0.0, 2.0}
    assert layers.Dropout(0.0)(x, rngs=rngs) is x and layers.Dropout(0.5)(x) is x
