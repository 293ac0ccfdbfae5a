"""KVM is used only where a guest would really be faster with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvbackup.recover import kvm


def test_without_a_device_there_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    assert not kvm.works()


def test_a_device_that_is_none_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert not kvm.works()


def test_a_kvm_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    (tmp_path / "hangs").write_text("#!/bin/sh\nexec sleep 3600\n")
    (tmp_path / "hangs").chmod(0o755)
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(kvm, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "hangs"))
    assert not kvm.works()


@pytest.mark.real
def test_the_answer_is_found_by_trying() -> None:
    """Whatever this machine has, the question is answered in time, and alone it can be asked on the command line."""
    done = subprocess.run([sys.executable, kvm.__file__], capture_output=True, timeout=120, check=False)
    assert done.returncode in (0, 1)
    assert not kvm.works() or done.returncode == 0
