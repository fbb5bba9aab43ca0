"""What a run writes down: means over steps, what stops it, what a resume forgets, and the filter that is not one."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mira_u_jax import events
from mira_u_jax.logger import Logger

NAN = float("nan")


def make(workdir, stage="train", step=0, steps=100, images=8):
    return Logger(workdir, stage, step=step, steps=steps, images_per_step=images)


def add(logger, *rows):
    """Metrics as the steps return them: float32 scalars on the device."""
    for row in rows:
        logger.add({name: jnp.float32(value) for name, value in row.items()})


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- means ------------------------------------------------------------------------------------------------------------


def test_a_line_is_the_mean_over_the_steps_since_the_last_one(tmp_path):
    logger = make(tmp_path)
    add(logger, {"loss": 1.0, "sigma": 0.2}, {"loss": 2.0, "sigma": 0.4})
    assert not lines(tmp_path)  # nothing is written, and nothing waited for, before a line is due
    logger.flush(2)
    add(logger, {"loss": 7.0, "sigma": 0.1})
    logger.flush(3)
    logger.flush(3)  # a save on the step of a line finds nothing to write
    assert [(r["step"], r["split"]) for r in lines(tmp_path)] == [(2, "train"), (3, "train")]
    assert [(r["loss"], r["sigma"]) for r in lines(tmp_path)] == [pytest.approx((1.5, 0.3)), pytest.approx((7.0, 0.1))]
    for row in lines(tmp_path):
        assert row["seconds"] > 0 and row["images_per_second"] > 0
    assert Logger.seconds(tmp_path) == pytest.approx(sum(r["seconds"] for r in lines(tmp_path)))


def test_a_mean_skips_the_steps_that_have_none_of_it(tmp_path):
    """NaN: where nothing was dropped there is no Dice of the dropped pixels. Their mean must not become NaN or 0."""
    logger = make(tmp_path)
    add(
        logger, {"loss": 1.0, "dropped_dice": NAN, "kept_dice": NAN}, {"loss": 2.0, "dropped_dice": 0.5, "kept_dice": NAN},
        {"loss": 3.0, "dropped_dice": 0.7, "kept_dice": NAN},
    )
    logger.flush(3)
    (row,) = lines(tmp_path)
    assert row["dropped_dice"] == pytest.approx(0.6)
    assert "kept_dice" not in row  # no step has one: no key, and no NaN, which is not JSON
    assert row["loss"] == 2


def test_speed_counts_the_images_of_the_steps_since_the_last_line(tmp_path, monkeypatch, capsys):
    clock = iter([100.0, 104.0, 104.0, 114.0, 114.0])
    monkeypatch.setattr("mira_u_jax.logger.time.perf_counter", lambda: next(clock))
    logger = make(tmp_path, step=10, steps=100, images=8)  # resumed at step 10: its first line counts from there
    add(logger, {"loss": 1.0})
    logger.flush(20)
    add(logger, {"loss": 1.0})
    logger.flush(40)
    assert [(r["seconds"], r["images_per_second"]) for r in lines(tmp_path)] == [(4, 20), (10, 16)]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("train 20/100 ") and first.endswith("20.0 images/s  0:32 left")
    assert second.startswith("train 40/100 ") and second.endswith("16.0 images/s  0:30 left")


# --- a loss that is not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_step(tmp_path, loss, bad):
    """The first bad step of those since the last line, with the gradient norms of that step; the line is not written."""
    logger = make(tmp_path)
    good = {"loss": 1.0, "grad_student": 0.25, "grad_vit": 2.0}
    add(logger, *[good] * 4)
    logger.flush(4)
    rows = [dict(good, grad_student=10.0 * i) for i in range(1, 4)]
    for i in range(bad, 3):
        rows[i]["loss"] = loss  # and all after it
    add(logger, *rows)
    with pytest.raises(FloatingPointError) as error:
        logger.flush(7)
    text = str(error.value)
    assert "\n" not in text and text.startswith("train: ")
    assert f"at step {5 + bad} (gradient norms: student {10 * (bad + 1)}, vit 2)" in text
    assert [r["step"] for r in lines(tmp_path)] == [4]


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    logger = make(tmp_path)
    add(logger, {"loss": 1.0, "grad_student": 0.5}, {"loss": 1.0, "grad_student": NAN})
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 2"):
        logger.flush(2)
    assert not lines(tmp_path)


def test_another_metric_that_is_not_a_number_does_not_stop_the_run(tmp_path):
    logger = make(tmp_path)
    add(logger, {"loss": 1.0, "kept_ece": NAN})
    logger.flush(1)
    assert lines(tmp_path)[0]["loss"] == 1


# --- resume -----------------------------------------------------------------------------------------------------------


def rows(*pairs):
    return [{"step": step, "split": split, "loss": 1.0} for split, step in pairs]


def test_a_resume_drops_the_lines_it_will_write_again(tmp_path):
    """Those of its own stage, and of the validations inside it, beyond its step; and the line that a kill cut short."""
    before = rows(
        ("pretrain", 2), ("pretrain", 4), ("train", 2), ("validation", 2), ("train", 4), ("validation", 4), ("train", 6)
    )
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in before) + '{"step": 8, "spl')
    make(tmp_path, step=4)
    assert lines(tmp_path) == before[:-1]
    make(tmp_path, step=3)
    assert lines(tmp_path) == before[:-3]
    make(tmp_path, stage="pretrain", step=2)
    assert lines(tmp_path) == [before[0], *before[2:-3]]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no file beside it


def test_a_stage_that_starts_keeps_what_earlier_stages_wrote(tmp_path):
    first = make(tmp_path, stage="pretrain")
    add(first, {"loss": 1.0})
    first.flush(1)
    second = make(tmp_path, stage="train")
    add(second, {"loss": 2.0})
    second.flush(1)
    second.write(1, "validation", {"validation_dice": 0.5})
    assert [(r["split"], r["step"]) for r in lines(tmp_path)] == [("pretrain", 1), ("train", 1), ("validation", 1)]
    assert lines(tmp_path)[2] == {"step": 1, "split": "validation", "validation_dice": 0.5}


# --- a filter that does not filter ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ((0.0, 0.0), "kept nothing for 2 steps"), ((1.0, 1.0), "kept every pixel for 2 steps"),
        ((0.0, 1e-4), None), ((1.0, 0.999), None), ((0.0, 1.0), None), ((0.3, 0.4), None), ((), None),
    ],
)
def test_a_filter_that_keeps_nothing_or_everything_is_named(tmp_path, capsys, keep, said):
    """Only where it did so at every step since the last line; a run without filter has no such metric."""
    logger = make(tmp_path)
    add(logger, *([{"loss": 1.0, "keep": k} for k in keep] or [{"loss": 1.0}] * 2))
    logger.flush(2)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    if said is None:
        assert not warnings
    else:
        assert len(warnings) == 1 and said in warnings[0] and "pseudo." in warnings[0]
    assert lines(tmp_path)[0].get("keep") == (pytest.approx(np.mean(keep)) if keep else None)


def test_only_the_first_process_writes_and_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mira_u_jax.logger.jax.process_index", lambda: 1)
    logger = make(tmp_path)
    add(logger, {"loss": 1.0, "keep": 0.0})
    logger.flush(1)
    assert not lines(tmp_path) and not capsys.readouterr().out
    add(logger, {"loss": NAN})
    with pytest.raises(FloatingPointError):  # but each one stops
        logger.flush(2)


def test_without_a_module_its_import_fails_and_later_does_not(tmp_path, monkeypatch):
    (tmp_path / "heavy_thing.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with events.without("heavy_thing"), pytest.raises(ImportError):
        import heavy_thing  # noqa: F401
    with events.without("json"):  # is there already
        import json as again
    assert again is json
    import heavy_thing

    assert sys.modules["heavy_thing"] is heavy_thing


def test_a_run_does_not_import_pytorch():
    """tensorboardX would, where it is installed."""
    pytest.importorskip("torch")
    code = "import sys, mira_u_jax.main; print('torch' in sys.modules, 'tensorboardX' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]
