"""The benchmark of a start runs the command itself, and passes on what it says when it ends too early."""

import json

import pytest

from benchmarks import start

pytestmark = pytest.mark.slow  # six starts of main


def test_both_stages_are_timed_to_their_first_line(synthetic_data_dir, tmp_path):
    report = tmp_path / "rows.json"
    config = f"configs/synthetic.py:preset=smoke,data_dir={synthetic_data_dir}"
    start.main([f"--config={config}", "--times=1", f"--json={report}"])
    rows = json.loads(report.read_text())
    assert [row["name"] for row in rows] == ["start, masked image modelling", "start, training"]
    assert all(len(row["warm_s"]) == 1 and min(row["cold_s"], *row["warm_s"]) > 0 for row in rows)


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: .*preset"):
        start.main(["--config=configs/synthetic.py:preset=none"])
