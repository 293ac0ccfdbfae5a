#!/usr/bin/env python3
"""Build the Debian package.

    python labs/deb.py [--to FOLDER]       dist/hvbackup_VERSION_ARCHITECTURE.deb

The package brings the Python packages it needs, in the versions of constraints.txt: Debian has few of them.  They live in a
virtual environment of their own, `/usr/lib/hvbackup`, on the distribution's Python, which sees the distribution's packages as
well (python3-libvirt).  Nothing is fetched when it is installed.  It is for the release it is built on, whose Python it needs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGING = ROOT / "packaging"
PYTHON = Path("/usr/bin/python3")
HOME = "usr/lib/hvbackup"
LAUNCHER = f"""\
#!/{HOME}/bin/python3 -I
import sys

from hvbackup.cli import main

sys.exit(main())
"""
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/hvbackup",
    "zsh": "usr/share/zsh/vendor-completions/_hvbackup",
    "fish": "usr/share/fish/vendor_completions.d/hvbackup.fish",
}
EXTRAS = ("service", "files")  # that the package brings, where the project has them


def build(to: Path) -> Path:
    """The package is in the folder when this returns its path."""
    with tempfile.TemporaryDirectory(prefix="hvbackup-deb-") as folder:
        tree = Path(folder) / "tree"
        python = python_version()
        environment(tree, python)
        papers(tree)
        configuration(tree)
        version = run(str(tree / HOME / "bin/python3"), "-I", "-c", "import hvbackup; print(hvbackup.__version__)")
        control(tree, version.replace(".dev", "~dev"), python)
        to.mkdir(parents=True, exist_ok=True)
        run("dpkg-deb", "--root-owner-group", "-Zxz", "-z1", "--build", str(tree), str(to))
        return to / f"hvbackup_{version.replace('.dev', '~dev')}_{architecture()}.deb"


def run(*words: str, **environment: str) -> str:
    """What a program printed.  Raises SystemExit with what went wrong."""
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"{' '.join(words[:4])} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


def python_version() -> tuple[int, int]:
    """Of the distribution's Python."""
    major, minor = json.loads(run(str(PYTHON), "-c", "import sys; print(list(sys.version_info[:2]))"))
    return major, minor


def architecture() -> str:
    """As Debian calls it."""
    return run("dpkg", "--print-architecture")


def environment(tree: Path, python: tuple[int, int]) -> None:
    """A virtual environment as it will be, with everything compiled."""
    home = tree / HOME
    packages = home / f"lib/python{python[0]}.{python[1]}/site-packages"
    (home / "bin").mkdir(parents=True)
    (home / "bin/python3").symlink_to(PYTHON)
    (home / "pyvenv.cfg").write_text(f"home = {PYTHON.parent}\ninclude-system-site-packages = true\n")
    known = json.loads(run(sys.executable, "-c", _EXTRAS))
    extras = ",".join(name for name in EXTRAS if name in known)
    pip = [sys.executable, "-m", "pip", f"--python={PYTHON}", "install", "-q", "--no-compile", "--no-warn-conflicts"]
    pip += ["--disable-pip-version-check", "--no-input", "--target", str(packages)]
    run(*pip, f"{ROOT}[{extras}]" if extras else str(ROOT), PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    shutil.rmtree(packages / "bin", ignore_errors=True)  # programs of packages; ours has a launcher
    compiled = ["-q", "--invalidation-mode", "unchecked-hash", "-s", str(tree), "-p", "/", str(packages)]
    run(str(PYTHON), "-m", "compileall", *compiled)
    launcher = tree / "usr/bin/hvbackup"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)


_EXTRAS = """
import json, tomllib
print(json.dumps(list(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"])))
"""


def papers(tree: Path) -> None:
    """Manual pages, completions and documents, made by the program itself."""
    program = [str(tree / HOME / "bin/python3"), "-I", "-m", "hvbackup"]
    pages = tree / "usr/share/man/man1"
    pages.mkdir(parents=True)
    run(*program, "man", "--to", str(pages))
    for page in pages.iterdir():
        (pages / f"{page.name}.gz").write_bytes(gzip.compress(page.read_bytes(), mtime=0))
        page.unlink()
    for shell, path in COMPLETIONS.items():
        (tree / path).parent.mkdir(parents=True)
        (tree / path).write_text(run(*program, "completion", shell) + "\n")
    documents = tree / "usr/share/doc/hvbackup"
    shutil.copytree(ROOT / "docs", documents, ignore=shutil.ignore_patterns("changes", "decisions"))
    for name in (ROOT / "LICENSE", ROOT / "README.md", PACKAGING / "debian/copyright"):
        shutil.copy(name, documents)


def configuration(tree: Path) -> None:
    """Units, the sample configuration, alert rules and the dashboard."""
    for unit in sorted((PACKAGING / "systemd").glob("*")):
        put(unit, tree / "usr/lib/systemd/system" / unit.name)
    if (PACKAGING / "config.toml").exists():
        put(PACKAGING / "config.toml", tree / "etc/hvbackup/config.toml")
        (tree / "etc/hvbackup").chmod(0o700)  # passwords of mail servers, and keys
    for name in ("prometheus-alerts.yml", "grafana-dashboard.json"):
        put(PACKAGING / name, tree / "usr/share/hvbackup" / name)


def put(source: Path, target: Path) -> None:
    """One file, readable by all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    target.chmod(0o644)


def control(tree: Path, version: str, python: tuple[int, int]) -> None:
    """What dpkg wants to know."""
    folder = tree / "DEBIAN"
    folder.mkdir()
    size = sum(f.lstat().st_size for f in tree.rglob("*") if f.is_file()) // 1024
    values = {
        "VERSION": version,
        "ARCHITECTURE": architecture(),
        "SIZE": str(size),
        "PYTHON": f"{python[0]}.{python[1]}",
        "PYTHON_AFTER": f"{python[0]}.{python[1] + 1}~",
    }
    text = (PACKAGING / "debian/control").read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    (folder / "control").write_text(text)
    kept = [f"/{f.relative_to(tree)}\n" for f in sorted((tree / "etc").rglob("*")) if f.is_file()]
    if kept:
        (folder / "conffiles").write_text("".join(kept))
    for name in ("postinst", "prerm", "postrm"):
        shutil.copy(PACKAGING / "debian" / name, folder)
        (folder / name).chmod(0o755)


def main(argv: Sequence[str] | None = None) -> None:
    """Build it, and say where it is."""
    parser = argparse.ArgumentParser(description="Build the Debian package.")
    parser.add_argument("--to", type=Path, default=ROOT / "dist", help="the folder (default: dist)")
    print(build(parser.parse_args(argv).to))


if __name__ == "__main__":
    main()
