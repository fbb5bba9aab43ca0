"""The tables as lists of cells: configurations that one command runs, in this order, each once.

    python -m mira_u_jax.grid --table=a --preset=cpu

A cell is a configuration file with its keys, to which the command adds preset and split. Pairs are (label seed, seed); label
seeds 0-2 served the choices made on the development images, so the results use the other five.
"""

PAIRS = [(s, s) for s in (3, 4, 5, 6, 7)]
FEW = PAIRS[:3]

OURS = ["method=mira_u", "method=supervised"]
BASELINES = [f"method={name}" for name in ("mean_teacher", "ua_mt", "fixmatch", "unimatch", "cross_teaching", "udamt")]
TABLE_5 = [f"ablate={name}" for name in ("no_uncertainty", "no_mim", "cnn_only", "no_entropy")]
# other readings of the paper's text
READINGS = [f"ablate={name}" for name in ("hard_label", "paper_label", "one_geometry", "grey_mim", "alg1")]
RIVALS = ["method=mean_teacher", "teacher=ema"]
TEACHERS = ["teacher=vit", "teacher=ema"]


def cells(fractions, choices, pairs) -> list[str]:
    """Pair by pair, so that what is done at any time can be compared."""
    return [
        f"configs/isic.py:frac={frac},{choice},label_seed={labels},seed={seed}"
        for labels, seed in pairs for frac in fractions for choice in choices
    ]


TABLES = {
    # few labels, where a semi-supervised method must show its worth, and all of them
    "a": cells((0.1, 0.05, 0.03, 1), OURS, PAIRS),
    # everybody else at 10%, and MIRA-U with a part changed; enough pairs for a verdict on its nearest rivals, and
    # Mean Teacher where labels are fewest
    "b": cells((0.1,), [*OURS, *BASELINES, *TEACHERS, *TABLE_5, *READINGS], FEW) + cells((0.1,), RIVALS, PAIRS[3:])
    + cells((0.03,), ["method=mean_teacher"], PAIRS),
    # Table 2's other fractions
    "c": cells((0.5, 0.25, 0.2, 0.3, 0.4), OURS, PAIRS),
    # Tables 2 and 3: the batch rows; PH2 is measured on the same runs (--also=ph2)
    "d": cells((0.5,), ["batch=4", "batch=6", "batch=8", "batch=16"], FEW),
    # the paper's tables to the letter
    "table1": cells((0.5,), ["ablate=T1", "ablate=T2", "ablate=T3", "ablate=T4"], FEW),
    "table2": cells((0.1, 0.2, 0.3, 0.4), ["batch=4"], FEW) + cells((0.5,), ["batch=8", "batch=6", "batch=4"], FEW),
    "table3": cells((0.5,), ["batch=16", "batch=8", "batch=4"], FEW),
    "table4": cells((0.5,), ["method=mira_u", "method=fixmatch"], FEW) + cells((0.1,), ["method=udamt"], FEW),
    "table5": cells((0.5,), ["method=mira_u", *TABLE_5], FEW),
}
