"""Which rows of results are possible: what means over images of masks thresholded once must satisfy (docs/paper.md, 6)."""

from mira_u_jax import paper

FIGURES = ("dice", "iou", "precision", "recall")
EXACT = 1e-9  # above what float64 adds to a mean that meets a bound with equality, below any digit that is printed

WORDS = """\
A marked row cannot hold means over one set of images of masks thresholded once, without smoothing: these satisfy \
Dice <= H(P,R), IoU >= D/(2-D), IoU >= P + R - 1 and IoU <= Dice, P and R; "within rounding" grants each figure half of its \
last digit, "as far as printed" is said where P and R are not.
Smoothed or soft Dice, columns averaged in different ways or over different images, different thresholds, or a slip in \
copying could each explain a marked row; it cannot be compared with unsmoothed per-image figures, and no more is said."""


def harmonic(p: float, r: float) -> float:
    """H(p, r) = 2 p r / (p + r), 0 at p = r = 0: Dice of one image from its precision and recall."""
    return 2 * p * r / (p + r) if p + r > 0 else 0.0


def jaccard(dice: float) -> float:
    """IoU of one image from its Dice, D / (2 - D)."""
    return dice / (2 - dice)


def excess(figures: dict, half: dict) -> dict[str, float]:
    """{what is wrong: by how much}, > 0 where a bound is broken, with each figure moved by half[name] in the row's favour.

    Every bound holds for a single image and survives averaging: Dice = H(p, r) is concave, IoU = D / (2 - D) convex, and
    p + r - 1 <= IoU <= D, p, r are linear. Counts pooled over images or batches are one large image and obey them too. Each
    bound moves the figures for itself, which is generous. Without precision or recall the first two are left.
    """

    def at(name, sign):
        return figures[name] + sign * half.get(name, 0.0)

    over = {"IoU too low": jaccard(at("dice", -1)) - at("iou", 1), "IoU above Dice": at("iou", -1) - at("dice", 1)}
    if complete(figures):
        over = {"Dice too high": at("dice", -1) - harmonic(at("precision", 1), at("recall", 1))} | over
        over["IoU below P + R - 1"] = at("precision", -1) + at("recall", -1) - 1 - at("iou", 1)
        over["IoU above P"] = at("iou", -1) - at("precision", 1)
        over["IoU above R"] = at("iou", -1) - at("recall", 1)
    return over


def complete(figures: dict) -> bool:
    return figures.get("precision") is not None and figures.get("recall") is not None


def verdict(figures: dict, half: dict | None = None) -> str:
    """Can these be means over one set of images of masks thresholded once, without smoothing? The verdict in words.

    figures: "dice", "iou" and, where known, "precision", "recall", in [0, 1]; other keys are ignored, so that an evaluation
    object will do. half: half of the last printed digit of each; None: full precision. "possible" is what breaks no bound
    as printed, "possible within rounding" what only rounding saves, anything else names the bounds and by how much the
    figures as printed break them.
    """
    printed = excess(figures, {})
    wrong = [name for name, by in excess(figures, half or {}).items() if by > EXACT]
    if wrong:
        return "; ".join(f"{name}, by {short(printed[name])}" for name in wrong)
    text = "possible within rounding" if max(printed.values()) > EXACT else "possible"
    return text if complete(figures) else f"{text}, as far as printed"


def published(row: paper.Row) -> tuple[dict, dict]:
    """(figures, half) of a row of the paper for `verdict`; a string of n decimals was rounded by at most .5 10^-n."""
    texts = {name: text for name in FIGURES if (text := getattr(row, name)) is not None}
    half = {name: 0.5 * 10.0 ** -len(text.partition(".")[2]) for name, text in texts.items()}
    return {name: float(text) for name, text in texts.items()}, half


def short(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def check_paper() -> str:
    """Every published row with its two bounds and its verdict, as a Markdown table, and what a verdict means."""
    lines = ["| row | Dice | H(P,R) | IoU | D/(2-D) | verdict |", "|---|---|---|---|---|---|"]
    for row in paper.ROWS:
        figures, half = published(row)
        cells = [
            f"Table {row.table}, {row.label}" + (" (cited)" if row.cited else ""), row.dice.removeprefix("0"),
            short(harmonic(figures["precision"], figures["recall"])) if complete(figures) else "-",
            row.iou.removeprefix("0"), short(jaccard(figures["dice"])), verdict(figures, half),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", WORDS])
