"""The benchmark of `predict` calls the command as a user does and reports what it saw."""

import json

import cv2
import pytest

from benchmarks import prediction


def test_the_command_is_watched_to_its_end(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "DRAWN", 3)
    report = tmp_path / "rows.json"
    prediction.main([f"--workdir={smoke_run}", "--images=5", "--width=60", "--height=40", f"--json={report}"])
    (row,) = json.loads(report.read_text())
    assert (row["masks"], row["images"], row["size"], row["passes"]) == (5, 5, 32, 2)
    assert 0 < row["until_first_mask_s"] <= row["seconds"]
    assert all(0 < held <= row["most_memory_mb"] for held in row["memory_mb"].values())
    assert row["commit"] and row["hardware"]


def test_photographs_repeat_after_those_that_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "DRAWN", 2)
    prediction.photographs(tmp_path / "photos", 3, 60, 40)
    files = sorted((tmp_path / "photos").iterdir())
    assert cv2.imread(str(files[0])).shape == (40, 60, 3)
    assert files[2].read_bytes() == files[0].read_bytes() != files[1].read_bytes()


def test_rates_are_those_of_what_was_seen():
    seen = [(1.0, 0, 900 << 20), (5.0, 4, 700 << 20), (6.0, 14, 710 << 20), (9.0, 20, 720 << 20), (10.0, 20, 720 << 20)]
    row = prediction.rates(seen, 20)
    assert row["images_per_s"] == pytest.approx(2) and row["until_first_mask_s"] == 5
    assert row["images_per_s_after"] == pytest.approx(16 / 5)
    assert row["memory_mb"] == {"10%": 700, "50%": 710, "100%": 720} and row["most_memory_mb"] == 900
