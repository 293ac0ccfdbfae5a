"""What every test run shares: profiles, which tests run real programs, and skips that fail where they hide something."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("quick", max_examples=30, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("ci", max_examples=60, deadline=None, print_blob=True, suppress_health_check=_SLOW)
settings.register_profile("soak", max_examples=2_000, deadline=None, print_blob=True, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "quick"))


def listen_to_signals() -> None:
    """Under nohup, or behind a shell's `&`, signals are ignored, and so they would be in every program that a test starts."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


listen_to_signals()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run hvbackup as a process of its own, in a `world`, are tests of a real program."""
    for item in items:
        if "world" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


PATIENCE_SECONDS = 60.0  # with the disk of the tests' own, which others use as well
TELLS_OF_STALLS = ("hvbackup.protect.journaling", "hvbackup.protect.streaming")


@pytest.fixture(autouse=True)
def patient_with_our_own_disk() -> Generator[None]:
    """No journal in this process stalls, but where a test says how soon."""
    with pytest.MonkeyPatch.context() as patch:
        for name in TELLS_OF_STALLS:
            if name in sys.modules:  # else nothing in this test keeps a journal
                patch.setattr(sys.modules[name], "STALL_SECONDS", PATIENCE_SECONDS)
        yield


def skips_are_failures() -> bool:
    """Whether this run must not leave anything out, as in CI."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes") or bool(os.environ.get("HVBACKUP_NO_SKIP"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and skips_are_failures():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and here a skip is a failure: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and skips_are_failures():
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped whole, and here a skip is a failure: {_reason(report)}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_sep("-", f"{skipped} tests skipped: what they check was not checked", yellow=True)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(report.longrepr)
