"""What is measured: a configuration and drawn images, the same for both frameworks. Imports neither of them."""

import ast

import numpy as np

from configs import common
from mira_u_jax import config as configuration


def config_of(setting: dict):
    """The checked configuration of {"preset", "size", "batch", "passes", "set": ["key=value", ...]}."""
    config = common.get_config(f"preset={setting['preset']}")
    changes = {"size": setting["size"], "train.batch": setting["batch"], "teacher.passes": setting["passes"]}
    if setting["passes"] == 1:  # source=both would need two
        changes["teacher.source"] = "vit"
    for item in setting.get("set", ()):
        key, _, text = item.partition("=")
        try:
            changes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[key] = text
    configuration.update(config, changes)
    return configuration.check(config)


# How the losses are compared: nothing random but what the views fix, and every pair mixed.
COMPARED = ["student.dropout=0.0", "vit.dropout=0.0", "augment.cutmix=1.0"]


def drawn_images(size: int, count: int = 64) -> dict:
    """{"image": (n, size, size, 3), "mask": (n, size, size)} uint8: a dark ellipse on noisy skin each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    centre, radius = rng.uniform(0.35, 0.65, (count, 2, 1, 1)), rng.uniform(0.12, 0.3, (count, 2, 1, 1))
    inside = ((y - centre[:, 0]) / radius[:, 0]) ** 2 + ((x - centre[:, 1]) / radius[:, 1]) ** 2 < 1
    colour = np.where(inside[..., None], [110, 70, 60], [220, 180, 160]) + rng.normal(0, 10, (count, size, size, 3))
    return {"image": colour.clip(0, 255).astype(np.uint8), "mask": np.where(inside, 255, 0).astype(np.uint8)}
