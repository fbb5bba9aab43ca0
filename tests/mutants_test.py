"""The faults of `make mutants` still fit the code; what catches them takes longer and is that command's business."""

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_fault_still_changes_the_program(mutant):
    mutants.changed(mutant)


def test_names_are_unique():
    assert len({m.name for m in mutants.MUTANTS}) == len(mutants.MUTANTS)
