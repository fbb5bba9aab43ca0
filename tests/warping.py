"""Cubic resampling by its definition (Keys 1981), in float64, without a word on neighbours: what augment.warp must equal."""

import numpy as np


def kernel(d, a=-0.75):
    """The cubic convolution kernel at distance d."""
    d = np.abs(d)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def warp(image, affine):
    """(h, w) by an inverse map (2, 3): at each place the sum over ALL pixels of the endlessly mirrored image, clipped."""
    (h, w), affine = image.shape, np.asarray(affine, np.float64)
    y, x = np.meshgrid((np.arange(h) + 0.5) * 2 / h - 1, (np.arange(w) + 0.5) * 2 / w - 1, indexing="ij")
    v, u = np.einsum("ij,jhw->ihw", affine, [y, x, np.ones_like(x)])
    row, col = (v + 1) * h / 2 - 0.5, (u + 1) * w / 2 - 0.5
    down, right = spread(row.ravel(), h), spread(col.ravel(), w)
    return np.clip(np.einsum("pi,ij,pj->p", down, image, right, optimize=True).reshape(h, w), 0, 1)


def spread(place, size, copies=8):
    """(places, size): what each pixel adds at each place of a line of the mirrored image."""
    weight = kernel(place[:, None] - np.arange(-copies * size, (copies + 1) * size))
    weight = weight.reshape(len(place), -1, size)
    turned = np.arange(-copies, copies + 1) % 2 == 1
    return np.where(turned[:, None], weight[..., ::-1], weight).sum(1)
