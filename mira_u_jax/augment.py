"""Augmentation on the device, inside the compiled step. Sections 3.1.2 and 3.4.

Functions act on ONE example and are vmapped by the batch functions at the end; images are (h, w, 3) float32 in [0, 1],
masks (h, w) in [0, 1]. Geometry moves image and mask together; colour moves the image only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mira_u_jax.rng import named, per_example

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601 luma, as Pillow's "L"; NumPy: an import uses no device


# --- geometry -------------------------------------------------------------------------------------------------------


def flipped(key, image, mask, cfg):
    """Image and mask turned upside down and mirrored, each with probability 1/2, where cfg.flip says so."""
    upside_down, mirror = jax.random.bernoulli(key, shape=(2,)) & cfg.flip
    for axis, flip in enumerate((upside_down, mirror)):
        image, mask = (jnp.where(flip, jnp.flip(x, axis), x) for x in (image, mask))
    return image, mask


def random_affine(key, cfg):
    """Inverse map (2, 3) of a rotation in +-cfg.rotate degrees, zoom in [1/(1+cfg.scale), 1+cfg.scale] and shift.

    It sends output to input coordinates, both in [-1, 1] across the image; cfg.shift is a share of the side.
    """
    keys = jax.random.split(key, 3)
    angle = jnp.deg2rad(jax.random.uniform(keys[0], minval=-cfg.rotate, maxval=cfg.rotate))
    zoom = jnp.exp(jax.random.uniform(keys[1], minval=-1.0, maxval=1.0) * jnp.log1p(cfg.scale))
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    linear = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    return jnp.concatenate([linear, jax.random.uniform(keys[2], (2, 1), minval=-2 * cfg.shift, maxval=2 * cfg.shift)], 1)


def warp(image, affine):
    """Cubic resampling of (h, w, c) in [0, 1] by an inverse map (2, 3); outside the frame the image is mirrored.

    Cubic as nnU-Net resamples images, for bilinear weights blur what is learned from and not what is measured on.
    """
    h, w, _ = image.shape
    y, x = jnp.meshgrid((jnp.arange(h) + 0.5) * 2 / h - 1, (jnp.arange(w) + 0.5) * 2 / w - 1, indexing="ij")
    v, u = (a[0] * y + a[1] * x + a[2] for a in affine)  # no product: an accelerator would round its factors
    row, col = (v + 1) * h / 2 - 0.5, (u + 1) * w / 2 - 0.5
    top, left = jnp.floor(row), jnp.floor(col)
    down, right = cubic(row - top), cubic(col - left)
    line = lambda i: sum(right[j] * image[mirrored(top + i - 1, h), mirrored(left + j - 1, w)] for j in range(4))  # noqa: E731
    return jnp.clip(sum(down[i] * line(i) for i in range(4)), 0.0, 1.0)


def cubic(t, a: float = -0.75):
    """Weights (h, w, 1) of the neighbours at -1, 0, 1, 2 of a place t in [0, 1): Keys (1981), a as in OpenCV and PyTorch."""
    near = lambda d: ((a + 2) * d - (a + 3)) * d * d + 1  # noqa: E731
    far = lambda d: ((a * d - 5 * a) * d + 8 * a) * d - 4 * a  # noqa: E731
    t = t[..., None]
    return far(1 + t), near(t), near(1 - t), far(2 - t)


def mirrored(index, size: int):
    """Reflect an index into [0, size) as in "dcba|abcd|dcba"."""
    index = jnp.mod(index.astype(jnp.int32), 2 * size)
    return jnp.where(index < size, index, 2 * size - 1 - index)


def warp_both(image, mask, affine):
    """An image (h, w, 3) and its mask (h, w), moved together."""
    both = warp(jnp.concatenate([image, mask[..., None]], -1), affine)
    return both[..., :3], both[..., 3]


# --- colour: op(image, m) with m in [-1, 1], 0 the identity wherever an operation has a sign -----------------------------


def blend(image, other, factor):
    """Pillow's ImageEnhance: `factor` 0 gives other, 1 the image, > 1 goes beyond; clipped to [0, 1]."""
    return jnp.clip(other + factor * (image - other), 0.0, 1.0)


def luma(image):
    return (image @ GREY)[..., None]


def identity(image, m):
    return image


def brightness(image, m):
    return blend(image, jnp.zeros_like(image), 1 + 0.5 * m)


def contrast(image, m):
    return blend(image, luma(image).mean(), 1 + 0.5 * m)


def saturation(image, m):
    return blend(image, luma(image), 1 + 0.9 * m)


def gamma(image, m):
    return jnp.power(jnp.maximum(image, 1e-6), jnp.exp2(m))


def temperature(image, m):
    """Warmer or cooler light: red up and blue down by up to 15%, or the reverse."""
    return jnp.clip(image * (1 + m * jnp.asarray([[[0.15, 0.0, -0.15]]])), 0.0, 1.0)


TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32)


def hue(image, m):
    """Turn colours about the grey axis by up to 25 degrees, in YIQ-like opponent space."""
    angle = m * jnp.deg2rad(25.0)
    cos, sin, zero, one = jnp.cos(angle), jnp.sin(angle), jnp.zeros(()), jnp.ones(())
    turn = jnp.stack(
        [jnp.stack([one, zero, zero]), jnp.stack([zero, cos, -sin]), jnp.stack([zero, sin, cos])]
    )
    exact = functools.partial(jnp.matmul, precision="highest")
    return jnp.clip(exact(image, exact(np.linalg.inv(TO_YIQ), exact(turn, TO_YIQ)).T), 0.0, 1.0)


def autocontrast(image, m):
    """Stretch each channel to [0, 1]; |m| blends between none and all of it. A constant channel stays, as in Pillow."""
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    flat = high - low < 1 / 255
    stretched = jnp.where(flat, image, (image - low) / jnp.where(flat, 1.0, high - low))
    return image + jnp.abs(m) * (stretched - image)


def posterize(image, m):
    """Reduce to 8 .. 4 bits a channel as |m| grows."""
    levels = jnp.exp2(8 - jnp.round(4 * jnp.abs(m)))
    return jnp.floor(jnp.clip(image, 0.0, 1 - 1e-6) * levels) / (levels - 1)


def smooth(image):
    """3x3 kernel (1 1 1; 1 5 1; 1 1 1) / 13 of Pillow's ImageFilter.SMOOTH, edges repeated."""
    p = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    h, w, _ = image.shape
    total = sum(p[i : i + h, j : j + w] for i in range(3) for j in range(3))
    return (total + 4 * image) / 13


def sharpness(image, m):
    """Blur (m < 0) or sharpen (m > 0)."""
    return blend(image, smooth(image), 1 + 0.9 * m)


COLOUR_OPS = (
    identity, brightness, contrast, saturation, gamma, temperature, hue, autocontrast, posterize, sharpness,
)


def colour_jitter(key, image, strength):
    """The weak colour change of section 3.1.2: brightness, contrast, saturation and temperature, each in +-strength."""
    for op, m in zip((brightness, contrast, saturation, temperature), jax.random.uniform(key, (4,)), strict=True):
        image = op(image, strength * (2 * m - 1))
    return image


def rand_augment(key, image, *, ops: int, magnitude: float):
    """RandAugment (Cubuk et al. 2020) over COLOUR_OPS: `ops` operations in turn, each of strength +-`magnitude` / 10."""
    for k in jax.random.split(key, ops):
        which, sign = jax.random.split(k)
        m = jnp.where(jax.random.bernoulli(sign), 1.0, -1.0) * magnitude / 10
        image = jax.lax.switch(jax.random.randint(which, (), 0, len(COLOUR_OPS)), COLOUR_OPS, image, m)
    return image


# --- boxes ----------------------------------------------------------------------------------------------------------


def random_box(key, h: int, w: int, low: float, high: float):
    """Mask (h, w) float32 that is 1 inside a random box, wholly in the frame, covering a share in [low, high] of it."""
    k_area, k_ratio, k_place = jax.random.split(key, 3)
    area = jax.random.uniform(k_area, minval=low, maxval=high)
    ratio = jnp.exp(jax.random.uniform(k_ratio, minval=-0.7, maxval=0.7))
    height, width = jnp.minimum(jnp.sqrt(area * ratio), 1.0), jnp.minimum(jnp.sqrt(area / ratio), 1.0)
    top, left = jax.random.uniform(k_place, (2,)) * jnp.stack([1 - height, 1 - width])
    y, x = (jnp.arange(h)[:, None] + 0.5) / h, (jnp.arange(w)[None] + 0.5) / w
    return ((y > top) & (y < top + height) & (x > left) & (x < left + width)).astype(jnp.float32)


def cutmix(key, probability: float, tree):
    """CutMix (Yun et al. 2019) within pairs: the partner of 2i is 2i + 1, so that it stays on its device.

    tree: of arrays (b, h, w) or (b, h, w, c), b even. Every array gets the SAME boxes; both partners get the same box.
    A pair is mixed with `probability`; the box covers 10 to 50% of the frame. Returns the mixed tree.
    """
    b, h, w = jax.tree.leaves(tree)[0].shape[:3]
    keys = per_example(key, b // 2)
    box = jax.vmap(lambda k: random_box(named(k, "box"), h, w, 0.1, 0.5))(keys)
    use = jax.vmap(lambda k: jax.random.bernoulli(named(k, "use"), probability))(keys)
    box = jnp.repeat(box * use[:, None, None], 2, axis=0) > 0  # b h w

    def mix(x):
        partner = rearrange(jnp.flip(rearrange(x, "(p two) ... -> p two ...", two=2), 1), "p two ... -> (p two) ...")
        return jnp.where(box if x.ndim == 3 else box[..., None], partner, x)

    return jax.tree.map(mix, tree)


# --- batches --------------------------------------------------------------------------------------------------------


def labelled_view(key, image, mask, cfg):
    """Augmented labelled batch: (b, h, w, 3), (b, h, w) in [0, 1] -> the same shapes. Same for every method."""

    def one(k, image, mask):
        image, mask = flipped(named(k, "flip"), image, mask, cfg.geometry)
        image, mask = warp_both(image, mask, random_affine(named(k, "geometry"), cfg.geometry))
        return colour_jitter(named(k, "colour"), image, cfg.labelled_colour), mask

    return jax.vmap(one)(per_example(key, image.shape[0]), image, mask)


def weak_strong_views(key, image, mask, cfg):
    """Views of each unlabelled image: a weak one, which lies as the photograph does, and strong ones of one geometry.

    image (b, h, w, 3); mask (b, h, w) is carried along for reporting only. Returns
      weak: (b, h, w, 3), flipped at random, its colours changed a little. What is predicted on it loses nothing to
        resampling; `moved` takes it to where the strong views are. Not cfg.upright: it lies as they do.
      strong: cfg.strong_views pairs (image (b, h, w, 3), notcut (b, h, w)), notcut 0 where CutOut erased the image. Pixel i
        is the same skin in all of them.
      affine: (b, 2, 3), of `moved`.
      mask: (b, h, w), as the weak view lies.
    """

    def strong_view(k, image):
        strong = rand_augment(named(k, "colour"), image, ops=cfg.strong_ops, magnitude=cfg.strong_magnitude)
        cut = random_box(named(k, "box"), *image.shape[:2], 0.02, max(cfg.cutout, 0.02)) * (cfg.cutout > 0)
        return jnp.where(cut[..., None] > 0, 0.5, strong), 1 - cut

    def one(k, image, mask):
        image, mask = flipped(named(k, "flip"), image, mask, cfg.geometry)
        affine = random_affine(named(k, "geometry"), cfg.geometry)
        if not cfg.upright:  # the weak view is turned at once, and nothing is left to be moved
            image, mask = warp_both(image, mask, affine)
            affine = jnp.eye(2, 3)
        weak, image = colour_jitter(named(k, "weak"), image, cfg.weak_colour), warp(image, affine)
        return weak, [strong_view(named(k, f"strong/{i}"), image) for i in range(cfg.strong_views)], affine, mask

    return jax.vmap(one)(per_example(key, image.shape[0]), image, mask)


def moved(maps, affine):
    """What belongs to the pixels of a weak view, a tree of (b, h, w) in [0, 1], warped to where its strong views are."""
    leaves, tree = jax.tree.flatten(maps)
    distinct = {id(x): x for x in leaves}  # two learners may share a label, and its target be its mu
    warped = jax.vmap(warp)(jnp.stack(list(distinct.values()), -1), affine)
    found = dict(zip(distinct, jnp.unstack(warped, axis=-1), strict=True))
    return jax.tree.unflatten(tree, [found[id(x)] for x in leaves])
