"""The teacher: a light ViT with a segmentation head, and its masked autoencoder. Section 3.1.1."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mira_u_jax.layers import Conv, ConvBlock, ConvTranspose, GroupNorm, Linear, TransformerBlock, fill, sincos_positions


class Encoder(nnx.Module):
    """Patch embedding, fixed sine-cosine positions, `depth` transformer blocks, LayerNorm."""

    def __init__(
        self, *, patch: int, channels: int, depth: int, heads: int, hidden: int, dropout: float, rngs: nnx.Rngs
    ):
        self.embedding = Linear(patch * patch * 3, channels, rngs=rngs)
        self.blocks = nnx.List(
            [TransformerBlock(channels, heads, hidden, dropout=dropout, rngs=rngs) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.patch, self.channels = patch, channels

    def embed(self, image):  # b h w 3 in [0, 1] -> b n c
        tokens = self.embedding(to_patches(2 * image - 1, self.patch))
        h, w = image.shape[1] // self.patch, image.shape[2] // self.patch
        return tokens + sincos_positions(h, w, self.channels)[None].astype(tokens.dtype)

    def __call__(self, tokens, *, rngs=None):  # b n c -> b n c
        for block in self.blocks:
            tokens = block(tokens, rngs=rngs)
        return self.norm(tokens)


class Teacher(nnx.Module):
    """ViT segmenter: RGB image in [0, 1], (b, h, w, 3) -> logits (b, h, w).

    The paper gives the encoder (8x8 patches, 4 layers, width 256, 4 heads, hidden 512, dropout .1) and no head. The head
    here unfolds each token to the pixels of its patch (`head_channels` each), adds a 3x3 convolution of the image and
    ends in one texture block. Without the image's own edges outlines stay bound to the patch grid, and the deviation of
    the passes maps that grid instead of doubt.
    """

    def __init__(
        self, *, patch: int, channels: int, depth: int, heads: int, hidden: int, head_channels: int, dropout: float,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(
            patch=patch, channels=channels, depth=depth, heads=heads, hidden=hidden, dropout=dropout, rngs=rngs
        )
        levels = patch.bit_length() - 1
        widths = [head_channels * 2**i for i in range(levels)]  # stride 1, 2, 4
        self.detail, self.norm, self.up, self.block, self.detail_norm = nnx.List(), nnx.List(), nnx.List(), nnx.List(), nnx.List()
        for i, c in enumerate(widths):
            self.detail.append(Conv(widths[i - 1] if i else 3, c, (3, 3), strides=2 if i else 1, rngs=rngs))
            self.detail_norm.append(GroupNorm(c))
            self.up.append(ConvTranspose(widths[i + 1] if i + 1 < levels else channels, c, rngs=rngs))
            self.norm.append(GroupNorm(c))
            self.block.append(ConvBlock(c, rngs=rngs))
        self.out = Conv(head_channels, 1, (1, 1), rngs=rngs)
        self.patch = patch

    def outputs(self, image, *, rngs=None):  # b h w 3 -> k b h w with k = 1, as the student's
        return self(image, rngs=rngs)[None]

    def __call__(self, image, *, rngs=None):  # b h w 3 -> b h w
        tokens = self.encoder(self.encoder.embed(image), rngs=rngs)
        x = rearrange(tokens, "b (i j) c -> b i j c", i=image.shape[1] // self.patch)
        y, details = 2 * image - 1, []
        for conv, norm in zip(self.detail, self.detail_norm, strict=True):
            y = nnx.gelu(norm(conv(y)))
            details.append(y)
        for i in reversed(range(len(details))):
            x = self.block[i](nnx.gelu(self.norm[i](self.up[i](x)) + details[i]))
        return self.out(x)[..., 0].astype(jnp.float32)


class MaskedAutoencoder(nnx.Module):
    """MAE on the teacher's encoder (section 3.1.1; He et al. 2022): the encoder sees visible patches only.

    Call: image (b, h, w, 3), key -> (reconstruction (b, n, patch * patch * 3), mask (b, n), 1 where hidden).
    """

    def __init__(self, teacher: Teacher, *, ratio: float, channels: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.encoder = teacher.encoder
        self.embedding = Linear(teacher.encoder.channels, channels, rngs=rngs)
        self.hidden_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (channels,)))
        self.blocks = nnx.List(
            [TransformerBlock(channels, heads, 2 * channels, dropout=0.0, rngs=rngs) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.out = Linear(channels, teacher.patch**2 * 3, rngs=rngs)
        self.patch, self.ratio, self.channels = teacher.patch, ratio, channels

    def __call__(self, image, key, *, rngs=None):
        tokens = self.encoder.embed(image)  # b n c
        hidden = hidden_patches(key, *tokens.shape[:2], self.ratio)  # b n
        order = jnp.argsort(hidden, axis=1, stable=True)  # visible first
        visible = order[:, : tokens.shape[1] - hidden_count(tokens.shape[1], self.ratio)]
        seen = self.embedding(self.encoder(jnp.take_along_axis(tokens, visible[..., None], 1), rngs=rngs))
        blank = jnp.zeros((image.shape[0], tokens.shape[1] - visible.shape[1], self.channels), seen.dtype)
        filler = fill(self.hidden_token[...], blank)
        place = jnp.argsort(order, axis=1)  # where each patch stands in (visible, hidden)
        x = jnp.take_along_axis(jnp.concatenate([seen, filler], 1), place[..., None], 1)
        positions = sincos_positions(image.shape[1] // self.patch, image.shape[2] // self.patch, self.channels)
        x = x + positions[None].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)).astype(jnp.float32), hidden


def to_patches(image, patch: int):  # b h w c -> b n (patch patch c)
    """Cut an image into non-overlapping patches, row by row."""
    return rearrange(image, "b (i p) (j q) c -> b (i j) (p q c)", p=patch, q=patch)


def hidden_count(patches: int, ratio: float) -> int:
    """How many of `patches` are hidden: round(ratio * patches), at least 1, at most all but one."""
    return min(max(round(ratio * patches), 1), patches - 1)


def hidden_patches(key, b: int, n: int, ratio: float):
    """Random mask (b, n) float32 with exactly hidden_count(n, ratio) ones a row."""
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, (b, n)), axis=1), axis=1)
    return (rank < hidden_count(n, ratio)).astype(jnp.float32)
