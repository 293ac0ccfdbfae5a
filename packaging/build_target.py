"""Compiles the stream's target while a wheel is built, and for an editable installation too: hatchling runs this.

Without a C compiler the rest of hvbackup is installed all the same; `protect --stream` then says what is missing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("hvbackup/target/target.c")
PROGRAM = Path("hvbackup/target/hvbackup-target")
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2"]


class TargetHook(BuildHookInterface[Any]):
    """One C file becomes one program, beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """The program is there when this returns, and belongs into the wheel."""
        compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
        if not compiler[0]:
            self.app.display_warning("No C compiler: hvbackup is installed without `protect --stream`")
            return
        root = Path(self.root)
        made = root / PROGRAM.with_suffix(".new")  # a running target keeps the file it was started from
        subprocess.run([*compiler, *FLAGS, "-o", str(made), str(root / SOURCE)], check=True)
        made.replace(root / PROGRAM)
        build_data["force_include"][str(root / PROGRAM)] = str(PROGRAM)
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
