"""The benchmark of what data cost a step takes the loop's own steps, both ways of reading."""

import json

import pytest

from benchmarks import input as benchmark
from configs import synthetic

pytestmark = pytest.mark.slow  # the data set is built first


def test_both_ways_are_timed_beside_one_batch(synthetic_data_dir, tmp_path):
    report = tmp_path / "rows.json"
    arg = f"configs/synthetic.py:preset=smoke,data_dir={synthetic_data_dir}"
    benchmark.main([f"--config={arg}", "--seconds=0", f"--json={report}"])
    rows = json.loads(report.read_text())
    assert [row["name"] for row in rows] == ["data, resident", "data, streamed"]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)


def test_own_batches_go_on_and_the_fixed_one_stays(synthetic_data_dir, tmp_path):
    config = synthetic.get_config(f"preset=smoke,data_dir={synthetic_data_dir}")
    loop = benchmark.Loop(config, "resident", tmp_path)
    places = lambda batches: next(batches)[1]["labelled"].tolist()  # noqa: E731
    assert places(loop.fixed) == places(loop.fixed)
    assert len({tuple(places(loop.batches)) for _ in range(3)}) == 3
