"""How far two outlines lie apart, and the band around one.

An outline is the pixels of a mask that have a neighbour above, below, left or right outside of it; beyond the image's edge
nothing belongs to a mask. A distance goes from a pixel's centre to the nearest centre of the other outline. That is what
a distance transform holds at these pixels; a k-d tree of the outline gives the same for less, whatever the size
of the image, and for pixels with unequal sides.
"""

import cv2
import numpy as np
from scipy.spatial import KDTree

LOST = 100.0  # percent of the diagonal that a missed or an invented lesion counts
GRID = 512  # side of the square grid on which distances are told in pixels too
TOLERANCE = 0.0075  # share of the diagonal within which outlines agree (boundary F1; Csurka et al. 2013)
BAND = 0.05  # share of the diagonal: half the width of the band around an outline
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def outline(mask: np.ndarray) -> np.ndarray:
    """The outline of a bool mask (h, w), a bool mask too. That of an empty mask is empty, that of a full one its frame."""
    inner = cv2.erode(mask.astype(np.uint8), CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & (inner == 0)


def distances(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """HD95, ASSD and boundary F1 of two bool masks of one shape (h, w), one image.

    hd95 and assd: 95th percentile and mean of the distances of every pixel of either outline to the other outline (as in
    MedPy 0.5). In percent of the image's diagonal, 0 (equal) to 100; *_px512: in pixels after the image
    is squashed to 512 x 512. If one mask is empty and the other is not they count the whole diagonal, so that nothing is
    dropped; two empty masks are equal. boundary_f1, 0 to 1: F1 of the shares of either outline that lie within .75% of the
    diagonal of the other. Raises ValueError.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"prediction {predicted.shape} and truth {truth.shape} differ in shape")
    a, b = np.argwhere(outline(predicted)), np.argwhere(outline(truth))
    if not len(a) or not len(b):
        right = len(a) == len(b)
        far, wide = (0.0, 0.0) if right else (LOST, GRID * 2**0.5)
        return {"hd95": far, "assd": far, "hd95_px512": wide, "assd_px512": wide, "boundary_f1": float(right)}
    shape = np.array(truth.shape)
    diagonal = np.hypot(*shape)
    there, back = nearest(a, b), nearest(b, a)
    percent = np.concatenate([there, back]) * (100 / diagonal)
    squashed = a * (GRID / shape), b * (GRID / shape)
    pixels = np.concatenate([nearest(*squashed), nearest(*squashed[::-1])])
    p, r = np.mean(there <= TOLERANCE * diagonal), np.mean(back <= TOLERANCE * diagonal)
    return {
        "hd95": float(np.percentile(percent, 95)), "assd": float(percent.mean()),
        "hd95_px512": float(np.percentile(pixels, 95)), "assd_px512": float(pixels.mean()),
        "boundary_f1": float(2 * p * r / (p + r)) if p + r else 0.0,
    }


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of each point of a (n, 2) to the nearest of b (k, 2), (n,)."""
    return KDTree(b).query(a)[0]


def band(mask: np.ndarray, share: float = BAND) -> np.ndarray:
    """Pixels (h, w) within `share` of the diagonal of a bool mask's outline; none where it has no outline."""
    edge = outline(mask)
    if not edge.any():
        return edge
    away = cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return away <= share * np.hypot(*mask.shape)
