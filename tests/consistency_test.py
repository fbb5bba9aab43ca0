"""Bounds on means over images: masks never break them, constructed rows do, and the document says what the code says."""

import pathlib
import re

import numpy as np
import pytest

from mira_u_jax import consistency, metrics, paper

ROOT = pathlib.Path(__file__).parent.parent
FAIR = {"dice": 0.85, "iou": 0.76, "precision": 0.88, "recall": 0.87}


def counts_of_masks(rng, images):
    """(images, 4) of masks 8 x 8 with any share of lesion and any error, some of them empty or full."""
    counts = []
    for share in rng.choice([0, 0.1, 0.5, 1], (images, 2, 1, 1)):
        predicted, truth = rng.uniform(size=(2, 8, 8)) < share
        if rng.uniform() < 0.3:  # right but for some pixels
            predicted = truth ^ (rng.uniform(size=(8, 8)) < 0.1)
        counts.append(metrics.confusion(predicted, truth))
    return np.stack(counts)


@pytest.fixture(scope="module")
def sets():
    """Counts (n, 4) of 900 sets of 1-11 images: a third of masks, the others drawn to have extreme precision and recall."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 12, 300)
    return [counts_of_masks(rng, n) for n in sizes] + [np.int64(rng.beta(0.2, 0.2, (n, 4)) * 50) for n in [*sizes, *sizes]]


def means(counts):
    return {name: float(values.mean()) for name, values in metrics.scores(counts).items()}


def test_the_sets_hold_what_is_hard(sets):
    missed = sum(any(c[0] + c[1] == 0 < c[0] + c[2] for c in counts) for counts in sets)
    invented = sum(any(c[0] + c[2] == 0 < c[1] for c in counts) for counts in sets)
    assert missed > 50 and invented > 50


def test_masks_never_break_a_bound(sets):
    for counts in sets:
        assert consistency.verdict(means(counts)) == "possible", counts.tolist()
        assert consistency.verdict(means(counts.sum(0))) == "possible", counts.tolist()  # pooled: one large image


@pytest.mark.parametrize("digits", [1, 2, 4])
def test_rounded_means_of_masks_are_never_marked(sets, digits):
    half = dict.fromkeys(consistency.FIGURES, 0.5 * 10.0**-digits)
    verdicts = {consistency.verdict({n: round(v, digits) for n, v in means(c).items()}, half) for c in sets}
    assert verdicts == {"possible", "possible within rounding"}


def test_bounds_are_reached(sets):
    """Each bound is met with equality by some masks, so none can be drawn tighter."""
    tight = dict.fromkeys(consistency.excess(FAIR, {}), -1.0)
    for counts in sets + [np.array([[5, 0, 3, 0], [7, 0, 0, 0]]), np.array([[5, 3, 0, 0], [7, 0, 0, 0]])]:
        tight = {name: max(tight[name], by) for name, by in consistency.excess(means(counts), {}).items()}
    assert tight == pytest.approx(dict.fromkeys(tight, 0), abs=1e-9)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "possible"),
        ({"dice": 0.8760, "iou": 0.79}, "Dice too high, by .0010"),  # H = .87497
        ({"dice": 0.8630, "iou": 0.7580}, "IoU too low, by .0010"),  # D / (2 - D) = .75901...
        ({"precision": 0.98, "recall": 0.79}, "IoU below P + R - 1, by .0100"),
        ({"precision": 0.97, "recall": 0.759, "dice": 0.84}, "IoU above R, by .0010"),
        ({"precision": 0.759, "recall": 0.97, "dice": 0.84}, "IoU above P, by .0010"),
        ({"iou": 0.8510}, "IoU above Dice, by .0010"),
        ({"dice": 0.89, "iou": 0.75}, "Dice too high, by .0150; IoU too low, by .0518"),
    ],
)
def test_each_bound_catches_its_violation(changed, verdict):
    assert consistency.verdict(FAIR | changed) == verdict


def test_nothing_right_and_everything_right():
    assert consistency.verdict(dict.fromkeys(consistency.FIGURES, 0.0)) == "possible"
    assert consistency.verdict(dict.fromkeys(consistency.FIGURES, 1.0)) == "possible"


@pytest.mark.parametrize(
    ("row", "enough"),  # enough: the half digit that just saves the row, from the number of figures that may move
    [
        ({"dice": 0.86, "iou": 0.79, "precision": 0.85, "recall": 0.85}, 0.01 / 2),  # H moves as P and R do
        ({"dice": 0.8, "iou": 0.6, "precision": 0.8, "recall": 0.8}, 0.028286),  # (.8 - h) / (1.2 + h) = .6 + h
        ({"dice": 0.85, "iou": 0.76, "precision": 0.98, "recall": 0.79}, 0.01 / 3),
        ({"dice": 0.84, "iou": 0.76, "precision": 0.759, "recall": 0.97}, 0.001 / 2),
        ({"dice": 0.84, "iou": 0.76, "precision": 0.97, "recall": 0.759}, 0.001 / 2),
        ({"dice": 0.85, "iou": 0.851, "precision": 0.88, "recall": 0.87}, 0.001 / 2),
    ],
)
def test_rounding_is_granted_and_no_more(row, enough):
    marked = consistency.verdict(row)
    assert ", by ." in marked and ";" not in marked
    assert consistency.verdict(row, dict.fromkeys(row, 1.01 * enough)) == "possible within rounding"
    assert consistency.verdict(row, dict.fromkeys(row, 0.99 * enough)) == marked


def test_without_precision_and_recall_only_dice_and_iou_are_compared():
    assert consistency.verdict({"dice": 0.9, "iou": 0.85}) == "possible, as far as printed"
    assert consistency.verdict({"dice": 0.9, "iou": 0.85, "precision": None, "recall": 0.1}) == "possible, as far as printed"
    assert consistency.verdict({"dice": 0.9, "iou": 0.8}) == "IoU too low, by .0182"


def test_an_evaluation_object_is_taken_as_it_is(sets):
    assert consistency.verdict(metrics.summary(sets[0], resamples=2)) == "possible"


def test_digits_of_a_published_figure():
    figures, half = consistency.published(paper.Row(9, "any", dice="0.9130", iou="0.86", recall="0.915"))
    assert figures == {"dice": 0.913, "iou": 0.86, "recall": 0.915}
    assert half == pytest.approx({"dice": 5e-5, "iou": 5e-3, "recall": 5e-4})


def parts(verdict):
    """{complaint: amount or None} of "Dice too high, by .0002; IoU too low"."""
    split = [part.partition(", by ") for part in verdict.split("; ")]
    return {name: amount or None for name, _, amount in split}


def documented():
    """{row: (Dice, H, IoU, D / (2 - D), verdict)} of docs/paper.md, section 6."""
    text = (ROOT / "docs" / "paper.md").read_text()
    section = text.partition("\n## 6. ")[2].partition("\n## 7. ")[0]
    found = {}
    for line in re.findall(r"^\| (Table .*) \|$", section, re.M):
        label, *cells = line.split(" | ")
        label, _, also = label.rstrip(")").partition(" (")
        found |= {name: cells for name in (label, also) if name}
    return found


def test_the_document_says_what_the_code_says():
    rows = {f"Table {row.table}, {row.label}": row for row in paper.ROWS if row.table != 4}
    assert set(documented()) == set(rows)
    for label, (*cells, said) in documented().items():
        figures, half = consistency.published(rows[label])
        h = consistency.harmonic(figures["precision"], figures["recall"])
        wanted = [figures["dice"], h, figures["iou"], consistency.jaccard(figures["dice"])]
        for cell, value in zip(cells, wanted, strict=True):
            assert float(cell) == pytest.approx(value, abs=0.5 * 10.0 ** (1 - len(cell)) + 1e-9), (label, cell)
        said, found = parts(said), parts(consistency.verdict(figures, half))
        assert set(said) == set(found), label
        assert all(amount in (None, found[name]) for name, amount in said.items()), label


def test_rows_without_precision_and_recall_are_those_of_table_4():
    for row in paper.ROWS:
        assert (row.precision is None) == (row.recall is None) == (row.table == 4), row
        if row.table == 4:
            assert consistency.verdict(*consistency.published(row)) == "possible, as far as printed"
        assert all(0 < float(f) < 1 for f in (row.dice, row.iou, row.accuracy or "0.5"))
