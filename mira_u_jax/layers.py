"""The layers that both networks are made of.

Alphabet of the shape comments: b batch, h w pixels or cells, n tokens, c d channels, k heads.
Dropout is drawn from the `rngs` handed to a call; `rngs=None` means no dropout, so nothing random is ever stored.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from mira_u_jax import linear

MASKED = -1e9  # added to the attention logits of a pair that must not meet; finite, so a fully masked row stays finite


def wide(x):
    """x in float32 at least, for sums: bfloat16 holds no count above 256."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def fill(parameter, like):
    """A parameter (c,) broadcast to `like` (..., c) and in its type. Its gradient, a sum over all pixels, is float32."""
    return jnp.broadcast_to(wide(parameter), like.shape).astype(like.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation over (h, w, channels of a group); per-channel scale and shift. Section 3.2.

    Written as two sums and one multiply-add per pixel: several times faster on a CPU than normalising the grouped view.
    """

    def __init__(self, channels: int, *, groups: int = 8, epsilon: float = 1e-5):
        if channels % groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {groups} groups")
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x):  # b h w c -> b h w c
        def group_mean(y):  # b c -> b c, each channel holding its group's mean
            grouped = rearrange(y, "b (g c) -> b g c", g=self.groups)
            return rearrange(jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape), "b g c -> b (g c)")

        mean = group_mean(wide(x).mean((1, 2)))
        variance = jnp.maximum(group_mean(jnp.square(wide(x)).mean((1, 2))) - jnp.square(mean), 0.0)
        gain = jax.lax.rsqrt(variance + self.epsilon) * self.scale[None]
        return (wide(x) * gain[:, None, None] + (self.bias[None] - mean * gain)[:, None, None]).astype(x.dtype)


class Conv(nnx.Conv):
    """nnx.Conv over (h, w) with half a kernel of zeros around the map, at any stride; the bias by `fill`."""

    def __call__(self, x):  # b h w c -> b h w d, over the stride
        kernel = self.kernel[...]
        x, kernel = (a.astype(jnp.promote_types(x.dtype, kernel.dtype)) for a in (x, kernel))
        y = linear.convolution(x, kernel, self.strides)
        return y if self.bias is None else y + fill(self.bias[...], y)


class ConvTranspose(nnx.Module):
    """3x3 transposed convolution of stride 2 that doubles h and w exactly. Section 3.2."""

    def __init__(self, c_in: int, c_out: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (3, 3, c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def __call__(self, x):  # b h w c -> b 2h 2w d
        y = linear.transposed_convolution(x, self.kernel[...].astype(x.dtype))
        return y + fill(self.bias[...], y)


class ConvBlock(nnx.Module):
    """Residual texture block: 3x3 conv, GroupNorm, GELU, 3x3 conv, GroupNorm, + input, GELU. Section 3.2."""

    def __init__(self, channels: int, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.conv1 = Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = GroupNorm(channels)
        self.conv2 = Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = GroupNorm(channels)
        self.dropout = Dropout(dropout)

    def __call__(self, x, *, rngs=None):  # b h w c -> b h w c
        y = self.norm2(self.conv2(nnx.gelu(self.norm1(self.conv1(x)))))
        return nnx.gelu(x + self.dropout(y, rngs=rngs))


class Linear(nnx.Module):
    """x @ kernel + bias over the last axis, as nnx.Linear, with the gradient of `linear.product`."""

    def __init__(self, c_in: int, c_out: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def __call__(self, x):  # ... c -> ... d
        y = linear.product(x, self.kernel[...])
        return y + fill(self.bias[...], y)


class Mlp(nnx.Module):
    """Two linear layers with GELU between. Section 3.1.1 (hidden size 512 in the teacher)."""

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = Linear(channels, hidden, rngs=rngs)
        self.down = Linear(hidden, channels, rngs=rngs)

    def __call__(self, x):  # ... c -> ... c
        return self.down(nnx.gelu(self.up(x)))


class Attention(nnx.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d) + bias) v; `context=None` is self-attention."""

    def __init__(self, channels: int, heads: int, *, rngs: nnx.Rngs):
        if channels % heads:
            raise ValueError(f"Attention: {channels} channels do not divide into {heads} heads")
        self.query = Linear(channels, channels, rngs=rngs)
        self.key_value = Linear(channels, 2 * channels, rngs=rngs)
        self.out = Linear(channels, channels, rngs=rngs)
        self.heads = heads

    def __call__(self, x, context=None, *, bias=None):  # b n c, b m c, bias (b or 1) k n m -> b n c
        context = x if context is None else context
        q = rearrange(self.query(x), "b n (k d) -> b n k d", k=self.heads)
        k, v = rearrange(self.key_value(context), "b m (s k d) -> s b m k d", s=2, k=self.heads)
        return self.out(rearrange(attend(q, k, v, bias), "b n k d -> b n (k d)"))


def attend(q, k, v, bias=None):  # b n k d, b m k d, b m k d, bias (b or 1) k n m -> b n k d
    """softmax(q k^T / sqrt(d) + bias) v of each head: what jax.nn.dot_product_attention computes.

    Laid out as one batch of matrices and normalised after the second product, it takes a third of that function's time
    on a CPU (docs/performance.md). The softmax is float32 whatever the inputs are.
    """
    b = q.shape[0]
    q, k, v = (rearrange(x, "b n k d -> (b k) n d") for x in (q, k, v))
    logits = jnp.einsum("xnd,xmd->xnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = rearrange(rearrange(logits, "(b k) n m -> b k n m", b=b) + bias, "b k n m -> (b k) n m")
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    mixed = jnp.einsum("xnm,xmd->xnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return rearrange(mixed / weights.sum(-1, keepdims=True), "(b k) n d -> b n k d", b=b).astype(v.dtype)


class TransformerBlock(nnx.Module):
    """Pre-norm ViT block: x + drop(attention(norm x)), then x + drop(mlp(norm x)). Section 3.1.1."""

    def __init__(self, channels: int, heads: int, hidden: int, *, dropout: float, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(channels, heads, rngs=rngs)
        self.norm2 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.mlp = Mlp(channels, hidden, rngs=rngs)
        self.dropout = Dropout(dropout)

    def __call__(self, x, *, rngs=None):  # b n c -> b n c
        x = x + self.dropout(self.attention(self.norm1(x)), rngs=rngs)
        return x + self.dropout(self.mlp(self.norm2(x)), rngs=rngs)


class WindowAttention(nnx.Module):
    """Attention inside `window` x `window` cells with a learned relative position bias; optionally shifted.

    A map that is no multiple of the window is padded and its padded keys masked; a map that fits into one window
    is one window, unshifted. With `context` it is the cross-attention of the skip connections: queries from x, keys and
    values from context, same windows. Section 3.2; Swin Transformer (Liu et al. 2021) for shift and bias.
    """

    def __init__(self, channels: int, heads: int, window: int, *, shifted: bool = False, rngs: nnx.Rngs):
        self.attention = Attention(channels, heads, rngs=rngs)
        table = 0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, ((2 * window - 1) ** 2, heads))
        self.relative_bias = nnx.Param(table)
        self.window, self.shifted = window, shifted

    def __call__(self, x, context=None):  # b h w c -> b h w c
        h, w = x.shape[1:3]
        wh, ww = min(self.window, h), min(self.window, w)
        shift = (wh // 2 if self.shifted and h > wh else 0, ww // 2 if self.shifted and w > ww else 0)
        pad = (-h % wh, -w % ww)

        def to_windows(y):
            y = jnp.pad(y, ((0, 0), (0, pad[0]), (0, pad[1]), (0, 0)))
            y = jnp.roll(y, (-shift[0], -shift[1]), (1, 2))
            return rearrange(y, "b (i wh) (j ww) c -> (b i j) (wh ww) c", wh=wh, ww=ww)

        index = relative_index(wh, ww, self.window)
        bias = rearrange(wide(self.relative_bias[...])[index], "n m k -> 1 k n m")
        mask = window_mask(h, w, wh, ww, shift)  # windows n m, or None where every pair may meet
        if mask is not None:
            mask = jnp.where(jnp.asarray(mask), 0.0, MASKED)[:, None]  # windows 1 n m
            bias = jnp.tile(bias + mask, (x.shape[0], 1, 1, 1))
        y = self.attention(to_windows(x), None if context is None else to_windows(context), bias=bias)
        rows, cols = (h + pad[0]) // wh, (w + pad[1]) // ww
        y = rearrange(y, "(b i j) (wh ww) c -> b (i wh) (j ww) c", i=rows, j=cols, wh=wh, ww=ww)
        return jnp.roll(y, shift, (1, 2))[:, :h, :w]


class SwinBlock(nnx.Module):
    """Pre-norm window attention and MLP, both residual. `shifted` marks the second block of a pair."""

    def __init__(self, channels, heads, window, *, shifted: bool, mlp_ratio: int, dropout: float, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attention = WindowAttention(channels, heads, window, shifted=shifted, rngs=rngs)
        self.norm2 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.mlp = Mlp(channels, mlp_ratio * channels, rngs=rngs)
        self.dropout = Dropout(dropout)

    def __call__(self, x, *, rngs=None):  # b h w c -> b h w c
        x = x + self.dropout(self.attention(self.norm1(x)), rngs=rngs)
        return x + self.dropout(self.mlp(self.norm2(x)), rngs=rngs)


class SwinPair(nnx.Module):
    """W-MSA block, then SW-MSA block: the two shallow Swin blocks of section 3.2."""

    def __init__(self, channels: int, heads: int, window: int, *, mlp_ratio: int, dropout: float, rngs: nnx.Rngs):
        make = lambda shifted: SwinBlock(  # noqa: E731
            channels, heads, window, shifted=shifted, mlp_ratio=mlp_ratio, dropout=dropout, rngs=rngs
        )
        self.regular, self.shifted = make(False), make(True)

    def __call__(self, x, *, rngs=None):  # b h w c -> b h w c
        return self.shifted(self.regular(x, rngs=rngs), rngs=rngs)


class CrossSkip(nnx.Module):
    """Skip connection refined by windowed cross-attention: query = decoder, key and value = encoder. Section 3.2."""

    def __init__(self, channels: int, heads: int, window: int, *, rngs: nnx.Rngs):
        self.norm_decoder = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.norm_encoder = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attention = WindowAttention(channels, heads, window, rngs=rngs)

    def __call__(self, decoder, encoder):  # b h w c, b h w c -> b h w c
        return decoder + encoder + self.attention(self.norm_decoder(decoder), self.norm_encoder(encoder))


class GateSkip(nnx.Module):
    """Skip connection at fine strides, where attention would be too large: decoder + sigmoid(1x1 of both) * encoder."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.gate = Conv(2 * channels, channels, (1, 1), rngs=rngs)

    def __call__(self, decoder, encoder):  # b h w c, b h w c -> b h w c
        # The two halves of the product apart: what comes from the encoder is the same in every Monte Carlo pass.
        kernel, c = self.gate.kernel[0, 0], decoder.shape[-1]
        gate = linear.product(decoder, kernel[:c]) + linear.product(encoder, kernel[c:])
        gate += fill(self.gate.bias[...], decoder)
        return decoder + nnx.sigmoid(gate) * encoder


class Dropout(nnx.Module):
    """Inverted dropout whose masks cost a quarter of nnx.Dropout's: one random word decides four elements.

    The rate is rounded to 1/256 (to no less, to no more than 255/256) and what stays is scaled by the rounded rate, so the
    expectation is exact. `whole_maps` drops whole channels, the same at every pixel.
    """

    def __init__(self, rate: float, *, whole_maps: bool = False):
        self.threshold, self.whole_maps = min(max(round(256 * rate), 1), 255) if rate else 0, whole_maps

    def __call__(self, x, *, rngs: nnx.Rngs | None = None):  # b ... c -> b ... c
        """x with the masks of `rngs`, or x itself when `rngs` is None."""
        if rngs is None or not self.threshold:
            return x
        *rest, c = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1]) if self.whole_maps else x.shape
        words = jax.random.bits(rngs.dropout(), (*rest, -(-c // 4)), jnp.uint32)
        draws = rearrange(jax.lax.bitcast_convert_type(words, jnp.uint8), "... n four -> ... (n four)")[..., :c]
        return jnp.where(draws >= self.threshold, x * (256 / (256 - self.threshold)), 0)


def sincos_positions(h: int, w: int, channels: int) -> np.ndarray:
    """Fixed 2-D sine-cosine position code, (h * w, channels) float32: half of the channels code the row, half the column."""
    frequency = 1 / 10000 ** (np.arange(channels // 4) / (channels // 4))

    def code(positions):
        angle = positions[:, None] * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)

    rows, cols = np.divmod(np.arange(h * w), w)
    return np.concatenate([code(rows), code(cols)], 1).astype(np.float32)


def relative_index(wh: int, ww: int, window: int) -> np.ndarray:
    """Row of the bias table for each (query, key) of a wh x ww window, (n, n) int; the table is laid out for `window`."""
    rows, cols = np.divmod(np.arange(wh * ww), ww)
    d_row = rows[:, None] - rows[None] + window - 1
    d_col = cols[:, None] - cols[None] + window - 1
    return d_row * (2 * window - 1) + d_col


def window_mask(h: int, w: int, wh: int, ww: int, shift: tuple[int, int]) -> np.ndarray | None:
    """Which (query, key) pairs may meet, (windows, n, n) bool; None when all may.

    After the cyclic shift a window can hold cells from opposite edges of the map: only cells of one region meet.
    Padded cells are a region of their own, so no real query sees a padded key.
    """
    rows, cols = h + -h % wh, w + -w % ww
    if shift == (0, 0) and (rows, cols) == (h, w):
        return None

    def region(length, real, size, shift):  # of each cell before the shift: wrapped cells 1, others 0, padded 2
        label = np.zeros(length, int)
        label[:shift] = 1
        label[real:] = 2
        return np.roll(label, -shift)

    label = 3 * region(rows, h, wh, shift[0])[:, None] + region(cols, w, ww, shift[1])[None]
    label = rearrange(label, "(i wh) (j ww) -> (i j) (wh ww)", wh=wh, ww=ww)
    return label[:, :, None] == label[:, None, :]
