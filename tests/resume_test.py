"""The whole run through the real command: end it, start it again, compare bits. `make kills` does more of this."""

import random

import kills
import pytest


@pytest.mark.slow
def test_runs_that_are_killed_or_told_to_leave_end_with_the_same_bits(tmp_path, synthetic_data_dir):
    runs = kills.Runs(tmp_path, synthetic_data_dir)
    runs.finish("whole")
    whole = runs.result("whole")
    # The log reads as if nothing had happened: each step of each stage once.
    steps = {"pretrain": kills.PRETRAIN, "train": kills.TRAIN}
    assert [row[:2] for row in whole[1]] == [(stage, s + 1) for stage, count in steps.items() for s in range(count)]
    assert len(kills.check_kills(runs, 3, random.Random(0), whole)) == 3
    assert len(kills.check_terms(runs, 1, random.Random(0), whole)) == 1
