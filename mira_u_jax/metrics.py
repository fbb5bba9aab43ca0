"""Segmentation metrics from pixel counts. Per-image means are the headline; pooled figures stand beside them.

Policies (docs/results.md): a prediction that misses the lesion altogether counts with Dice 0 and precision 0, it is never
dropped; an empty prediction of an empty truth is right (all 1).
"""

import numpy as np

FAILURE_IOU = 0.65  # below it the ISIC-2018 challenge called a segmentation failed (inter-observer agreement)


def confusion(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixel counts (tp, fp, fn, tn), int64 (4,), of two bool masks of one shape."""
    if predicted.shape != truth.shape:
        raise ValueError(f"prediction {predicted.shape} and truth {truth.shape} differ in shape")
    tp = np.count_nonzero(predicted & truth)
    fp, fn = np.count_nonzero(predicted) - tp, np.count_nonzero(truth) - tp
    return np.array([tp, fp, fn, truth.size - tp - fp - fn], np.int64)


def scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, IoU, accuracy, precision and recall, each (...) in [0, 1], of counts (..., 4) = (tp, fp, fn, tn)."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)

    def ratio(numerator, denominator):  # 0 / 0: right when nothing was missed or invented, else wrong
        return np.where(denominator > 0, numerator / np.maximum(denominator, 1), (fp + fn == 0).astype(float))

    return {
        "dice": ratio(2 * tp, 2 * tp + fp + fn), "iou": ratio(tp, tp + fp + fn),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn), "precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn),
    }


def failures(iou: np.ndarray) -> np.ndarray:
    """Which images failed, bool (n,)."""
    return iou < FAILURE_IOU


def summary(counts: np.ndarray, *, each=None, pooled=None, weighed=None, resamples: int = 2000, seed: int = 0) -> dict:
    """The evaluation object of a set of images; counts (n, 4) as `confusion`.

    each: {name: (n,)}, further figures that average over images; pooled: {name: (function, (n, ...))}, figures that are a
    function of sums over images; weighed: {name: function}, figures that are a function of how often each image counts,
    (..., n); one that is NaN is left out. missed: images whose lesion was not found at all (empty prediction);
    failure_rate: share with IoU < .65. ci95: a percentile bootstrap over images: how exact THIS run's figure is, not
    whether a method is better.
    """
    counts = np.asarray(counts, np.int64)
    n = len(counts)
    images = scores(counts) | {name: np.asarray(values, np.float64) for name, values in (each or {}).items()}
    failed = failures(images["iou"])

    def figures(times):  # how often each image is taken, (..., n)
        whole = scores(times @ counts)
        found = {name: times @ values / n for name, values in images.items()}
        found |= {"dice_pooled": whole["dice"], "iou_pooled": whole["iou"], "failure_rate": times @ failed / n}
        for name, (function, values) in (pooled or {}).items():
            found[name] = function(np.tensordot(times, values, 1))
        for name, function in (weighed or {}).items():
            found[name] = function(times)
        return found

    draw = np.random.default_rng(seed).integers(0, n, (resamples, n))
    boot = figures(np.stack([np.bincount(rows, minlength=n) for rows in draw]))
    found = {name: float(value) for name, value in figures(np.ones(n, np.int64)).items() if np.isfinite(value)}
    bounds = {name: np.nanpercentile(boot[name], [2.5, 97.5]).tolist() for name in found}
    empty = (counts[:, 0] + counts[:, 1] == 0) & (counts[:, 0] + counts[:, 2] > 0)
    return {"images": n, **found, "missed": int(empty.sum()), "ci95": bounds}
