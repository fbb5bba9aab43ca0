"""Pictures of a run: panels of images side by side, and its curves."""

import functools
import io
import json
import pathlib

import jax
import matplotlib
import numpy as np

from mira_u_jax import pseudo, sharding, whole
from mira_u_jax.config import outlined
from mira_u_jax.rng import named

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"sigma": ("magma", 0, 0.3), "weight": ("viridis", 0, 1)}  # name -> colour map and its ends; others are grey, 0..1


def panel(path, columns: dict[str, np.ndarray], rows: list[str]):
    """Write a PNG with one row an image and one column a map.

    columns: title -> (b, h, w, 3) or (b, h, w), values in [0, 1]; rows: b labels.
    """
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(1.7 * len(columns), 1.75 * len(rows)), squeeze=False, layout="constrained"
    )
    for j, (title, images) in enumerate(columns.items()):
        colours, low, high = COLOURS.get(title, ("gray", 0, 1))
        for i, image in enumerate(images):
            drawn = axes[i, j].imshow(np.clip(image, 0, 1), cmap=colours, vmin=low, vmax=high)
            axes[i, j].set(xticks=[], yticks=[], title=title if i == 0 else "")
        if title in COLOURS:
            figure.colorbar(drawn, ax=axes[:, j], location="bottom", shrink=0.8, aspect=12)
    for i, label in enumerate(rows):
        axes[i, 0].set_ylabel(label, fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    whole.write(path, png.getvalue())
    plt.close(figure)


CURVES = {  # title -> names in metrics.jsonl
    "losses": ("loss_sup", "loss_unsup", "loss_ent", "loss_vit_sup", "loss_vit_unsup"),
    "weight of the pseudo-labels": ("beta", "keep", "w", "w_outline"),
    "deviation of the passes": ("sigma", "sigma_outline"),
    "Dice on the pool, hidden masks": ("teacher_dice", "student_dice", "kept_dice", "dropped_dice"),
    "calibration error of mu, hidden masks": ("kept_ece", "dropped_ece"),
    "gradient norms": ("grad_student", "grad_vit"),
}


def training_curves(workdir):
    """Draw what DIR/metrics.jsonl says of stage 2 by step, into DIR/figures/curves.png."""
    workdir = pathlib.Path(workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    panels = {title: drawn for title, names in CURVES.items() if (drawn := [n for n in names if any(n in r for r in rows)])}
    height, width = (2, 3) if len(panels) > 3 else (1, len(panels))
    figure, axes = plt.subplots(height, width, figsize=(4 * width, 2.8 * height), squeeze=False, layout="constrained")
    for ax, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            ax.plot(*zip(*points, strict=True), label=name, linewidth=1.3)
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    (workdir / "figures").mkdir(exist_ok=True)
    figure.savefig(workdir / "figures" / "curves.png", dpi=100)
    plt.close(figure)


def training_path(workdir, step: int) -> pathlib.Path:
    """Where the picture of a step lies."""
    return pathlib.Path(workdir) / "figures" / f"train_{step:06d}.png"


def training_figure(run, networks, labelled, *, steps: int, count: int = 6):
    """A function (step, state) that draws training_path and returns it.

    Image, truth, pseudo-label, sigma, weight (w times keep) and the averaged student's prediction of the same few images
    without outlines (of labelled ones where all are labelled); supervised runs have no pseudo-label.
    """
    config, semi = run.config, run.config.loss.beta > 0
    hidden = np.setdiff1d(run.dataset.unlabelled, labelled)
    shown = (hidden if len(hidden) else labelled)[:: max(len(hidden if len(hidden) else labelled) // count, 1)][:count]

    image, mask = (values.astype(np.float32) / 255 for values in run.dataset.rows.take(shown).values())

    @functools.partial(jax.jit, out_shardings=sharding.replicated(run.mesh))
    def look(state, image, key):
        maps = {"prediction": jax.nn.sigmoid(networks["student"](state.ema["student"], image))}
        if semi:
            label = pseudo.pseudo_labels(
                state, image, named(key, "figures"), networks=networks, config=config, share=state.step / steps
            )["student"]
            maps |= {"pseudo-label": label.target, "sigma": label.sigma, "weight": label.w * label.keep}
        return maps

    def draw(step, state):
        known = {"image": image, "truth": mask} if outlined(config) else {"image": image}
        maps = known | jax.device_get(look(state, image, run.key))
        path = training_path(run.workdir, step)
        if jax.process_index():  # every process computes, the first one writes
            return path
        titles = [t for t in ("image", "truth", "pseudo-label", "sigma", "weight", "prediction") if t in maps]
        panel(path, {t: maps[t] for t in titles}, [str(i) for i in shown])
        return path

    return draw
