"""The planted bugs still fit the code, and the tests still notice them."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs.mutants import MUTANTS, ROOT, Mutant, judge, table

pytestmark = pytest.mark.walk


def test_each_planted_bug_still_fits_the_code() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.name
        assert all((ROOT / Path(test.split("::")[0])).exists() for test in mutant.tests), mutant.name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.quick], ids=lambda m: m.name)
def test_the_tests_notice_a_planted_bug(mutant: Mutant) -> None:
    assert judge(mutant).killed


@pytest.mark.soak
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if not m.quick], ids=lambda m: m.name)
def test_the_long_tests_notice_a_planted_bug(mutant: Mutant) -> None:
    verdict = judge(mutant)
    assert verdict.killed, table([verdict])
