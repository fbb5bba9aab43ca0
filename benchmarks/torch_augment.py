"""The views of mira_u_jax/augment.py on PyTorch batches: the same transforms with the same ranges, from another generator.

Images are (b, 3, h, w) float32 in [0, 1], maps (b, h, w). Colour operations take an image and m (b, 1, 1, 1) in [-1, 1].
The few numbers an example needs are drawn on the host and sent over, so that choosing an operation never waits for a device.
"""

import functools
import math

import torch
import torch.nn.functional as F

# --- geometry ---------------------------------------------------------------------------------------------------------


def uniform(generator, shape, low, high):
    return low + (high - low) * torch.rand(shape, generator=generator)


def flipped(generator, image, mask, cfg):
    """Image and mask turned upside down and mirrored, each with probability 1/2."""
    for axis in (-2, -1):
        flip = ((torch.rand(len(image), generator=generator) < 0.5) & cfg.flip).to(image.device, non_blocking=True)
        image = torch.where(flip[:, None, None, None], image.flip(axis), image)
        mask = torch.where(flip[:, None, None], mask.flip(axis), mask)
    return image, mask


def random_affine(generator, b: int, cfg):
    """Inverse maps (b, 2, 3), x before y as affine_grid wants: rotation, zoom in [1/(1+scale), 1+scale], shift."""
    angle = uniform(generator, b, -math.radians(cfg.rotate), math.radians(cfg.rotate))
    zoom = torch.exp(uniform(generator, b, -1.0, 1.0) * math.log1p(cfg.scale))
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    linear = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    return torch.cat([linear, uniform(generator, (b, 2, 1), -2 * cfg.shift, 2 * cfg.shift)], 2)


def warp(image, affine):
    """Cubic resampling of (b, c, h, w) by inverse maps (b, 2, 3), mirrored outside the frame."""
    grid = F.affine_grid(affine, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


# --- colour -----------------------------------------------------------------------------------------------------------


@functools.cache
def constant(values, device):
    return torch.tensor(values, device=device)


def luma(image):
    return (image * constant((0.299, 0.587, 0.114), image.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def blend(image, other, factor):
    return (other + factor * (image - other)).clamp(0, 1)


def brightness(image, m):
    return (image * (1 + 0.5 * m)).clamp(0, 1)


def contrast(image, m):
    return blend(image, luma(image).mean((1, 2, 3), keepdim=True), 1 + 0.5 * m)


def saturation(image, m):
    return blend(image, luma(image), 1 + 0.9 * m)


def gamma(image, m):
    return image.clamp(min=1e-6) ** torch.exp2(m)


def temperature(image, m):
    return (image * (1 + m * constant((0.15, 0.0, -0.15), image.device).view(1, 3, 1, 1))).clamp(0, 1)


YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
RGB = tuple(map(tuple, torch.linalg.inv(torch.tensor(YIQ)).tolist()))  # inverted here: a GPU would be waited for


def hue(image, m):
    to_yiq, to_rgb = constant(YIQ, image.device), constant(RGB, image.device)
    angle = m.flatten() * math.radians(25)
    turn = torch.zeros(len(m), 3, 3, device=image.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = torch.cos(angle)
    turn[:, 2, 1] = torch.sin(angle)
    turn[:, 1, 2] = -turn[:, 2, 1]
    return torch.einsum("bij,bjhw->bihw", to_rgb @ turn @ to_yiq, image).clamp(0, 1)


def autocontrast(image, m):
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    flat = high - low < 1 / 255
    stretched = torch.where(flat, image, (image - low) / torch.where(flat, 1.0, high - low))
    return torch.lerp(image, stretched, m.abs().expand_as(image))


def posterize(image, m):
    levels = torch.exp2(8 - torch.round(4 * m.abs()))
    return torch.floor(image.clamp(0, 1 - 1e-6) * levels) / (levels - 1)


def sharpness(image, m):
    smooth = (9 * F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1) + 4 * image) / 13
    return blend(image, smooth, 1 + 0.9 * m)


COLOUR_OPS = (
    lambda image, m: image, brightness, contrast, saturation, gamma, temperature, hue, autocontrast, posterize, sharpness,
)


def colour_jitter(generator, image, strength):
    for op in (brightness, contrast, saturation, temperature):
        image = op(image, uniform(generator, (len(image), 1, 1, 1), -strength, strength).to(image.device, non_blocking=True))
    return image


def rand_augment(generator, image, *, ops: int, magnitude: float):
    """Per example `ops` operations in turn; examples that drew the same one go through it together."""
    for _ in range(ops):
        which = torch.randint(len(COLOUR_OPS), (len(image),), generator=generator)
        sign = torch.randint(2, (len(image), 1, 1, 1), generator=generator) * 2.0 - 1
        m, image = (sign * magnitude / 10).to(image.device, non_blocking=True), image.clone()
        for op in set(which.tolist()) - {0}:
            rows = (which == op).nonzero()[:, 0].to(image.device, non_blocking=True)  # a list would wait
            image[rows] = COLOUR_OPS[op](image[rows], m[rows])
    return image


# --- boxes ------------------------------------------------------------------------------------------------------------


def random_boxes(generator, b: int, h: int, w: int, low: float, high: float, device):
    """(b, h, w) bool: True in a box of the frame that covers a share in [low, high] of it."""
    area, ratio = uniform(generator, b, low, high), torch.exp(uniform(generator, b, -0.7, 0.7))
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).clamp(max=1)
    start = torch.rand(2, b, generator=generator) * (1 - size)
    (top, left), (bottom, right) = (edge.to(device, non_blocking=True)[:, :, None, None] for edge in (start, start + size))
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (h, w))
    y, x = y[None, :, None], x[None, None]
    return (y > top) & (y < bottom) & (x > left) & (x < right)


def cutmix_boxes(generator, b: int, h: int, w: int, probability: float, device):
    """(b, h, w) bool, the same for the partners 2i and 2i + 1: True where a pixel comes from the partner."""
    use = (torch.rand(b // 2, 1, 1, generator=generator) < probability).to(device, non_blocking=True)
    return (random_boxes(generator, b // 2, h, w, 0.1, 0.5, device) & use).repeat_interleave(2, 0)


def cutmix(box, x):
    """x (b, h, w) or (b, c, h, w) with the partner's pixels where `box`."""
    partner = x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.where(box if x.ndim == 3 else box[:, None], partner, x)


# --- batches ----------------------------------------------------------------------------------------------------------


def labelled_view(generator, image, mask, cfg):
    """Augmented labelled batch: image (b, 3, h, w), mask (b, h, w)."""
    image, mask = flipped(generator, image, mask, cfg.geometry)
    affine = random_affine(generator, len(image), cfg.geometry).to(image.device, non_blocking=True)
    moved = warp(torch.cat([image, mask[:, None]], 1), affine)
    return colour_jitter(generator, moved[:, :3], cfg.labelled_colour), moved[:, 3]


def weak_strong_views(generator, image, mask, cfg):
    """Weak view, strong view, notcut (0 where CutOut erased the strong view), the map from weak to strong, mask."""
    image, mask = flipped(generator, image, mask, cfg.geometry)
    affine = random_affine(generator, len(image), cfg.geometry).to(image.device, non_blocking=True)
    strong = rand_augment(generator, warp(image, affine), ops=cfg.strong_ops, magnitude=cfg.strong_magnitude)
    notcut = torch.ones_like(mask)
    if cfg.cutout:
        b, _, h, w = image.shape
        cut = random_boxes(generator, b, h, w, 0.02, max(cfg.cutout, 0.02), image.device)
        strong, notcut = strong.masked_fill(cut[:, None], 0.5), 1 - cut.float()
    return colour_jitter(generator, image, cfg.weak_colour), strong, notcut, affine, mask
