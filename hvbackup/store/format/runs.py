"""Run records: what happened to the store, in a chain.

`runs/WRITER/SEQ` is a sealed file with the hash of the record before it, so that a record (and the point it tells of) can't
vanish or come back unnoticed.  The hash of the newest record is kept at a second place, under STATE: when the store is put back
from an old copy, its chain ends before that hash.  Several processes of one machine append to one chain, one at a time.

    killed after            left behind                     mended by
    point committed         a point no record tells of      adopt(), when the owner opens the store
    record written          the head under STATE is older   the next record
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import blake3

from hvbackup.errors import HvbackupError
from hvbackup.files import Files
from hvbackup.store.backend import Backend
from hvbackup.store.format import layout as f
from hvbackup.store.format.keys import Keyring
from hvbackup.store.format.sealed import seal, unseal

FOLDER = "runs"
CHAIN_LOCK = "chain.lock"  # under STATE
CHAIN_SECONDS = 60.0  # a record is one small file
HEAD = "head.json"  # under STATE: the writer's name, and the newest record it wrote


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the chain; `value` has at least `kind` and `t`."""

    path: str
    digest: str
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """The newest record of one chain at some time."""

    writer: str
    seq: int
    digest: str


class Runs:
    """The chain of one writer, and all others to read.  Thread safety: one thread."""

    def __init__(self, backend: Backend, ring: Keyring, state: Files) -> None:
        self._backend, self._ring, self._state = backend, ring, state
        self.on_head: Callable[[Head], None] = lambda _: None  # told of each record that we append
        self._head = self._load_head()

    def _load_head(self) -> dict[str, Any]:
        try:
            head = f.parse_json(self._state.read(HEAD))
            if head.pop("check") != _check(head):
                raise ValueError("it is not what was written")
            return {"writer": str(head["writer"]), "seq": int(head["seq"]), "digest": str(head["digest"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return {"writer": secrets.token_hex(8), "seq": -1, "digest": ""}

    @property
    def writer(self) -> str:
        """The name of this machine's chain: who we are to other writers of the store."""
        return str(self._head["writer"])

    def settle(self) -> None:
        """This machine has a name in the chain, on disk, when this returns; only for who writes."""
        with self._alone():
            self._follow()
            if not self._state.exists(HEAD):
                self._keep(self._head["seq"], self._head["digest"])

    def _alone(self) -> AbstractContextManager[None]:
        """No other process of this machine appends for as long as the context lasts."""
        return self._state.owner(CHAIN_LOCK, "The chain of run records", wait_seconds=CHAIN_SECONDS)

    def _follow(self) -> None:
        """What other processes of this machine have appended is behind us; before we have written, their name is ours."""
        if self._state.exists(HEAD):
            found = self._load_head()
            if self._head["seq"] < 0 or found["writer"] == self._head["writer"]:
                self._head = found

    def append(self, value: dict[str, Any]) -> None:
        """The record is in the chain when this returns."""
        with self._alone():
            self._follow()
            self._catch_up()
            seq = self._head["seq"] + 1
            path = f"{FOLDER}/{self._head['writer']}/{seq:010d}"
            data = seal(self._ring, f.KIND_RUN, path, {**value, "previous": self._head["digest"]})
            self._backend.write_new(path, data)
            self._keep(seq, blake3.blake3(data).hexdigest())
            self.on_head(Head(self.writer, seq, blake3.blake3(data).hexdigest()))

    def _catch_up(self) -> None:
        """Step over records that were written when the head could not be."""
        if self._head["seq"] >= 0 and not self._backend.exists(
            f"{FOLDER}/{self._head['writer']}/{self._head['seq'] + 1:010d}"
        ):
            return  # the usual case, and a chain may have a million records
        names = [n for n in self._backend.names(f"{FOLDER}/{self._head['writer']}") if n.isdecimal()]
        if names and int(names[-1]) > self._head["seq"]:
            data = self._backend.read(f"{FOLDER}/{self._head['writer']}/{names[-1]}")
            self._keep(int(names[-1]), blake3.blake3(data).hexdigest())

    def _keep(self, seq: int, digest: str) -> None:
        self._head = {"writer": self._head["writer"], "seq": seq, "digest": digest}
        self._state.replace(HEAD, json.dumps({**self._head, "check": _check(self._head)}).encode())

    def __iter__(self) -> Iterator[Record]:
        """Every readable record, by writer and sequence."""
        for record in self._read():
            if isinstance(record, Record):
                yield record

    def recent(self, count: int) -> list[Record]:
        """The newest readable records of every writer, at most `count` of each."""
        found = []
        for writer in self._backend.names(FOLDER):
            for name in self._backend.names(f"{FOLDER}/{writer}")[-count:]:
                record = self._one(f"{FOLDER}/{writer}/{name}")
                found += [record] if isinstance(record, Record) else []
        return found

    def after(self, seen: Mapping[str, str], count: int) -> list[Record]:
        """The readable records that came after those seen (by writer), in the order of their times; at most so many of each."""
        found = []
        for writer in self._backend.names(FOLDER):
            last = seen.get(writer, "")
            new = [n for n in self._backend.names(f"{FOLDER}/{writer}")[-count:] if n > last]
            found += [r for n in new if isinstance(r := self._one(f"{FOLDER}/{writer}/{n}"), Record)]
        return sorted(found, key=lambda r: int(r.value.get("t", 0)))

    def _read(self) -> Iterator[Record | str]:
        for writer in self._backend.names(FOLDER):
            for name in self._backend.names(f"{FOLDER}/{writer}"):
                yield self._one(f"{FOLDER}/{writer}/{name}")

    def _one(self, path: str) -> Record | str:
        """A record, or what is wrong with it."""
        try:
            data = self._backend.read(path)
            return Record(path, blake3.blake3(data).hexdigest(), unseal(self._ring, f.KIND_RUN, path, data))
        except FileNotFoundError:
            return f"{path} is missing"
        except HvbackupError as e:
            return str(e)

    def problems(self, heads: Sequence[Head] = ()) -> list[str]:
        """What is wrong with the chains, and with what they tell of.

        Damaged or missing records, files that vanished, and a store that was put back from an old copy: one in which the newest
        record that this machine wrote is missing, or any of `heads`, which were kept elsewhere.
        """
        found: list[str] = []
        previous: dict[str, Head] = {}
        told, digests = Told(), set()
        for record in self._read():
            if isinstance(record, str):
                found.append(record)
                continue
            writer, seq = record.path.split("/")[1], int(record.path.split("/")[2])
            last = previous.get(writer, Head(writer, -1, ""))
            if seq != last.seq + 1 or record.value.get("previous") != last.digest:
                found.append(f"{FOLDER}/{writer} is broken between records {last.seq} and {seq}")
            previous[writer] = Head(writer, seq, record.digest)
            digests.add(record.digest)
            told.tell(record)
        found += [
            f"{file}, of which {path} tells, is gone, and no record says that it was meant to be"
            for file, path in told.expected().items()
            if not self._backend.exists(file)
        ]
        own = Head(self.writer, int(self._head["seq"]), str(self._head["digest"]))
        return found + [_rolled_back(h, h == own) for h in dict.fromkeys([own, *heads]) if _is_missing(h, digests)]

    def heads(self) -> list[Head]:
        """The newest record of every chain: what to keep elsewhere."""
        found = []
        for writer in self._backend.names(FOLDER):
            names = [n for n in self._backend.names(f"{FOLDER}/{writer}") if n.isdecimal()]
            if names:
                data = self._backend.read(f"{FOLDER}/{writer}/{names[-1]}")
                found.append(Head(writer, int(names[-1]), blake3.blake3(data).hexdigest()))
        return found


class Told:
    """What should be in the store, by its records.  They may come in any order: each writer has a chain of its own.

    `point` and `added` name files that were put there, `forgotten` and `removed` files that went on purpose.  A point that came
    back out of the trash is `restored`, with the `tombstone` that had named it, and may be forgotten again by another.
    """

    def __init__(self) -> None:
        self._told: dict[str, str] = {}  # file -> the record that tells of it
        self._gone: set[tuple[str, str]] = set()
        self._back: set[tuple[str, str]] = set()

    def tell(self, record: Record) -> None:
        """One more record."""
        value, tombstone = record.value, str(record.value.get("tombstone", ""))
        for file in [*([value["point"]] if "point" in value else []), *value.get("added", ())]:
            self._told.setdefault(str(file), record.path)
        self._gone.update((str(f), tombstone) for f in [*value.get("forgotten", ()), *value.get("removed", ())])
        self._back.update((str(f), tombstone) for f in value.get("restored", ()))

    def expected(self) -> dict[str, str]:
        """Every file that should be there, with the record that tells of it."""
        gone = {file for file, _ in self._gone - self._back}
        return {file: path for file, path in self._told.items() if file not in gone}


def _is_missing(head: Head, digests: set[str]) -> bool:
    return head.seq >= 0 and head.digest not in digests


def _rolled_back(head: Head, own: bool) -> str:
    whose = "which this machine wrote" if own else "which was there when the heads were kept"
    return (
        f"Record {head.seq} of {FOLDER}/{head.writer}, {whose}, is gone: "
        "the store was put back from an older copy, or its newest files were removed"
    )


def _check(head: dict[str, Any]) -> str:
    return blake3.blake3(json.dumps(head, sort_keys=True).encode()).hexdigest()[:16]
