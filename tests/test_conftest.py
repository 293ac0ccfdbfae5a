"""The rule about skips is itself checked: a run in CI that leaves something out must be red."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).with_name("conftest.py").read_text()
SKIPPING = """
    import pytest

    @pytest.mark.skip(reason="no such program")
    def test_marked(): pass

    def test_in_the_body(): pytest.skip("not here")

    @pytest.mark.xfail(strict=True)
    def test_known_wrong(): assert False

    def test_fine(): pass
"""
SKIPPED_WHOLE = """
    import pytest
    pytest.skip("not on this system", allow_module_level=True)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HVBACKUP_NO_SKIP", raising=False)
    pytester.makeconftest(CONFTEST)
    return pytester


def test_elsewhere_skips_are_counted_aloud(suite: pytest.Pytester) -> None:
    suite.makepyfile(SKIPPING)
    result = suite.runpytest("-p", "no:randomly", "-p", "no:xdist")
    result.assert_outcomes(passed=1, skipped=2, xfailed=1)
    result.stdout.fnmatch_lines(["*2 tests skipped: what they check was not checked*"])


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("HVBACKUP_NO_SKIP", "1")])
def test_in_ci_each_skip_is_a_failure(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    suite.makepyfile(SKIPPING)
    result = suite.runpytest("-p", "no:xdist")
    result.assert_outcomes(passed=1, errors=1, failed=1, xfailed=1)
    result.stdout.fnmatch_lines(["*no such program*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_in_ci_a_module_skipped_whole_is_a_failure(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile(SKIPPED_WHOLE)
    result = suite.runpytest("-p", "no:xdist")
    result.assert_outcomes(errors=1)
    assert result.ret != pytest.ExitCode.OK
