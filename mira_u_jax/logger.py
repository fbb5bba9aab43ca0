"""What a run says: one JSON object a line in metrics.jsonl, and a progress line with speed and time left."""

import functools
import json
import pathlib
import time

import jax
import numpy as np

from mira_u_jax import whole
from mira_u_jax.events import Events


class Logger:
    """Writer of DIR/metrics.jsonl and, for TensorBoard, DIR/events; on process 0 only.

    Metrics stay on the device until a line is due.
    """

    def __init__(self, workdir, stage: str, *, step: int, steps: int, images_per_step: int):
        self.path, self.first = pathlib.Path(workdir) / "metrics.jsonl", step
        self.stage, self.steps, self.images_per_step = stage, steps, images_per_step
        self.pending, self.active = [], jax.process_index() == 0
        if self.active:
            self.forget_after(step)
        self.since = (step, time.perf_counter())

    def forget_after(self, step: int):
        """Drop this stage's lines beyond `step`: a resumed run writes them again."""
        if not self.path.exists():
            return

        def keep(line):
            try:
                row = json.loads(line)
            except ValueError:  # the line a kill cut short
                return False
            mine = {"train": ("train", "validation")}.get(self.stage, (self.stage,))
            return row["split"] not in mine or row["step"] <= step

        lines = [line for line in self.path.read_text().splitlines() if keep(line)]
        whole.write(self.path, "".join(line + "\n" for line in lines))

    def add(self, metrics: dict):
        """Keep one step's metrics (device scalars) for the next line; does not wait for them."""
        self.pending.append(metrics)

    def flush(self, step: int):
        """Write the mean since the last line and print progress. FloatingPointError where loss or gradient is not finite."""
        if not self.pending:
            return
        rows = jax.device_get(self.pending)
        self.pending = []
        for i, row in enumerate(rows):
            gradients = {k[5:]: v for k, v in row.items() if k.startswith("grad_")}
            if not np.isfinite([row["loss"], *gradients.values()]).all():
                norms = ", ".join(f"{name} {norm:.3g}" for name, norm in gradients.items())
                what = "gradient" if np.isfinite(row["loss"]) else "loss"
                raise FloatingPointError(
                    f"{self.stage}: the {what} is not finite at step {step - len(rows) + 1 + i} (gradient norms: {norms});"
                    " lower optim.lr, or look at the images of that step"
                )
        mean = {name: value for name in rows[0] if (value := mean_of([row[name] for row in rows])) is not None}
        done, then = self.since
        seconds = time.perf_counter() - then
        speed = (step - done) * self.images_per_step / max(seconds, 1e-9)
        self.since = (step, time.perf_counter())
        self.write(step, self.stage, mean | {"images_per_second": speed, "seconds": seconds})
        left = (self.steps - step) * self.images_per_step / max(speed, 1e-9)
        shown = ("loss", "loss_sup", "loss_unsup", "teacher_dice", "student_dice", "sigma_outline", "keep")
        text = "  ".join(f"{k} {mean[k]:.3f}" for k in shown if k in mean)
        if self.active and not 0 < mean.get("keep", 0.5) < 1:
            which = "every pixel" if mean["keep"] else "nothing"
            print(f"warning: the filter kept {which} for {len(rows)} steps; look at its threshold, pseudo.*", flush=True)
        if self.active:
            clock = f"{int(left) // 60}:{int(left) % 60:02d}"
            print(f"{self.stage} {step}/{self.steps}  {text}  {speed:.1f} images/s  {clock} left", flush=True)

    @staticmethod
    def seconds(workdir) -> float:
        """Time all lines of a run stand for, compilation included, work that a kill threw away not."""
        lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
        return sum(json.loads(line).get("seconds", 0.0) for line in lines)

    def write(self, step: int, split: str, values: dict):
        """Append {"step", "split", name: value}."""
        if self.active:
            with self.path.open("a") as f:
                f.write(json.dumps({"step": step, "split": split, **values}) + "\n")
            self.events.scalars(step, split, values)

    def picture(self, step: int, path):
        """A picture that was drawn at `step`, for TensorBoard."""
        if self.active:
            self.events.picture(step, self.stage, path)

    @functools.cached_property
    def events(self) -> Events:
        return Events(self.path.parent, self.stage, step=self.first)


def mean_of(values) -> float | None:
    """Mean of a metric over the steps that have it: a step without it says NaN; None when no step has it."""
    had = [float(v) for v in values if np.isfinite(v)]  # JSON knows no infinity either
    return sum(had) / len(had) if had else None
