"""Where things are on this machine: the store, its caches, the configuration, and the keys.

                    root                        anybody else                         set by
    store           /var/lib/hvbackup/store     $XDG_DATA_HOME/hvbackup/store        --store, HVBACKUP_STORE
    STATE           /var/lib/hvbackup/state     $XDG_STATE_HOME/hvbackup             HVBACKUP_STATE
    configuration   /etc/hvbackup               $XDG_CONFIG_HOME/hvbackup            HVBACKUP_CONFIG
    run directory   /run/hvbackup               $XDG_RUNTIME_DIR/hvbackup            HVBACKUP_RUN

STATE is a cache beside the store, never above or inside it, so that removing it can't take a store along.  The configuration
directory holds `keys/STORE-ID.key`, and nothing of a key is ever written to STATE.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvbackup.errors import KeyRefused, UsageError

KEYS = "keys"  # in the configuration directory
HEADS = "heads"  # likewise
UNFINISHED_KEY = "unfinished-"  # begins the name of the key of a store whose `init` did not end


@dataclass(frozen=True, slots=True)
class Places:
    """The directories of one invocation."""

    store: Path
    state: Path
    configuration: Path
    run: Path

    @property
    def boots(self) -> Path:
        """Machines that are booted from points."""
        return self.state / "boots"

    @property
    def rings(self) -> Path:
        """What guests wrote and no journal has yet; in memory, for it is plain text."""
        return Path(f"/dev/shm/hvbackup-{os.geteuid()}")  # noqa: S108 - `private` looks whose it is

    @property
    def scratch(self) -> Path:
        """What a guest overwrites while it is read."""
        return self.state / "scratch"


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """What was said about keys."""

    key_file: Path | None = None
    passphrase_file: Path | None = None

    @property
    def given(self) -> bool:
        """Whether anything was."""
        return self.key_file is not None or self.passphrase_file is not None


def places(store: str = "", environment: Mapping[str, str] = os.environ, *, root: bool | None = None) -> Places:
    """The directories, by option, environment and habit, in this order.  Raises UsageError when STATE holds the store."""
    root = os.geteuid() == 0 if root is None else root
    found = Places(
        Path(store or environment.get("HVBACKUP_STORE", "") or _default(environment, root, "DATA")),
        Path(environment.get("HVBACKUP_STATE", "") or _default(environment, root, "STATE")),
        Path(environment.get("HVBACKUP_CONFIG", "") or _default(environment, root, "CONFIG")),
        Path(environment.get("HVBACKUP_RUN", "") or _default(environment, root, "RUNTIME")),
    )
    found = Places(*(Path(os.path.abspath(p)) for p in (found.store, found.state, found.configuration, found.run)))
    if found.store.is_relative_to(found.state) or found.state.is_relative_to(found.store):
        raise UsageError(
            f"The state directory {found.state} and the store {found.store} must not contain each other: "
            "the state is a cache that may be removed at any time; set HVBACKUP_STATE"
        )
    return found


_ROOT = {
    "DATA": "/var/lib/hvbackup/store",
    "STATE": "/var/lib/hvbackup/state",
    "CONFIG": "/etc/hvbackup",
    "RUNTIME": "/run/hvbackup",
}
_HOME = {"DATA": ".local/share", "STATE": ".local/state", "CONFIG": ".config"}


def _default(environment: Mapping[str, str], root: bool, what: str) -> str:
    if root:
        return _ROOT[what]
    name = f"XDG_{what}_DIR" if what == "RUNTIME" else f"XDG_{what}_HOME"
    base = environment.get(name, "")
    if not os.path.isabs(base):  # the XDG rules: anything else is ignored
        home = environment.get("HOME", "") or "/"
        base = _temporary() if what == "RUNTIME" else os.path.join(home, _HOME[what])
    if what == "RUNTIME" and name not in environment:
        return os.path.join(base, f"hvbackup-{os.geteuid()}")
    return os.path.join(base, "hvbackup", "store") if what == "DATA" else os.path.join(base, "hvbackup")


def _temporary() -> str:
    import tempfile  # it costs more than all the rest of this module

    return tempfile.gettempdir()


def private(folder: Path) -> Path:
    """The folder exists and is ours alone when this returns.  Raises UsageError: in a shared place anybody may have made it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise UsageError(f"Cannot make the folder {folder}: {e.strerror}; set HVBACKUP_RUN") from e
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UsageError(
            f"{folder} belongs to somebody else or can be written by others; remove it, or set HVBACKUP_RUN"
        )
    return folder


def key_options(
    key_file: str | None, passphrase_file: str | None, environment: Mapping[str, str] = os.environ
) -> KeyOptions:
    """Options of the command line, or else of the environment."""
    if key_file or passphrase_file:
        return KeyOptions(_path(key_file), _path(passphrase_file))
    return KeyOptions(_path(environment.get("HVBACKUP_KEY_FILE")), _path(environment.get("HVBACKUP_PASSPHRASE_FILE")))


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def key_path(configuration: Path, store_id: str) -> Path:
    """Where the key of a store is kept unless somebody said otherwise."""
    return configuration / KEYS / f"{store_id}.key"


def heads_path(configuration: Path, store_id: str) -> Path:
    """Where the newest records of a store's chains are kept, if somebody wants them to be."""
    return configuration / HEADS / f"{store_id}.json"


def kept_keys(configuration: Path, store_id: str) -> list[Path]:
    """The key files that may open a store: its own, or else those that an `init` left before it could name them."""
    own = key_path(configuration, store_id)
    return [own] if own.exists() else sorted((configuration / KEYS).glob(f"{UNFINISHED_KEY}*.key"))


def read_secret(path: Path, what: str) -> str:
    """The text of a key or passphrase file.  Raises KeyRefused."""
    try:
        return path.read_text()
    except UnicodeDecodeError as e:
        raise KeyRefused(f"{what} {path} is not text") from e
    except OSError as e:
        raise KeyRefused(f"{what} {path} can't be read: {e.strerror}") from e
