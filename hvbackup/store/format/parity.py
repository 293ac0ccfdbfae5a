"""Parity: a sidecar beside a pack, out of which damaged or missing ranges of that pack are made again (Reed-Solomon, `zfec`).

    packs/3f/3f9c….pack      the pack, in DATA_SHARDS equal parts, the last one padded with zeroes
    packs/3f/3f9c….parity    front | PARITY_SHARDS parts of the same length | front | length of the front

A front has the layout and a checksum for each block of 4 KiB, of the pack and of the parity; it is there twice.  Blocks at the
same place of all parts make a stripe, and each stripe can lose PARITY_SHARDS blocks: two ranges anywhere, or one of a tenth of
the pack.  What comes out is believed only if it hashes to the pack's name.

    killed after            left behind                cleaned by
    a sidecar renamed       packs without one          the next `cover`
    a pack replaced         the others still damaged   the next `repair`
    PARITY written          packs without a sidecar    the next `cover`

Removing a pack removes its sidecar first (`pack.files_of`), so no sidecar is left alone but after damage; `cover` removes those.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np
from numpy.typing import NDArray

from hvbackup.errors import HvbackupError, StoreDamage, UsageError
from hvbackup.model import KiB, MiB
from hvbackup.store.format import pack as packs

if TYPE_CHECKING:
    from hvbackup.store.backend import Backend

MAGIC = b"hvP1"
HEAD = struct.Struct("<4sBBHIQ32s")  # magic, data shards, parity shards, zero, block, length of the pack, its name
DATA_SHARDS, PARITY_SHARDS = 20, 2  # a tenth more room
BLOCK_BYTES = 4 * KiB  # what one flipped bit costs: the sector of most disks
SUM_BYTES = 8
WANTED = "PARITY"  # at the top of the store: whoever adds packs covers them
PACK_MAX = 512 * MiB  # no larger pack is covered: it is held in memory

Shards = NDArray[np.uint8]  # one row for each shard


@dataclass(slots=True)
class Covered:
    """What `cover` did."""

    made: int = 0
    removed: int = 0  # sidecars without a pack
    pack_bytes: int = 0
    parity_bytes: int = 0
    damaged: tuple[str, ...] = ()  # packs that are not what their name says, and so get none


@dataclass(frozen=True, slots=True)
class _Front:
    """The layout of a sidecar."""

    data: int
    parity: int
    block: int
    length: int
    name: bytes

    @property
    def stripes(self) -> int:
        return -(-self.length // (self.data * self.block))

    @property
    def shard(self) -> int:
        """Bytes of one part."""
        return self.stripes * self.block

    @property
    def size(self) -> int:
        """Bytes of a front: head, checksums, digest."""
        return HEAD.size + (self.data + self.parity) * self.stripes * SUM_BYTES + 32


def cover(backend: Backend, progress: Callable[[int, int], None] = lambda _done, _total: None) -> Covered:
    """Every whole pack has a sidecar, and there is no other, when this returns.  Raises UsageError without `zfec`."""
    require()
    done, names = Covered(), packs.list_packs(backend)
    have = set(sidecars(backend))
    for name in sorted(have.difference(names)):
        backend.remove(packs.parity_of(name))
        done.removed += 1
    todo = [n for n in names if n not in have]
    for number, name in enumerate(todo, 1):
        _cover_one(backend, name, done)
        progress(number, len(todo))
    return done


def _cover_one(backend: Backend, name: str, done: Covered) -> None:
    try:
        if backend.size(packs.path_of(name)) > PACK_MAX:
            return
        data = backend.read(packs.path_of(name))
    except FileNotFoundError:
        return  # removed meanwhile
    except HvbackupError:
        data = b""
    if blake3.blake3(data).hexdigest() != name:
        done.damaged += (name,)
        return
    sidecar = made(data)
    backend.write_new(packs.parity_of(name), sidecar)
    done.made += 1
    done.pack_bytes += len(data)
    done.parity_bytes += len(sidecar)


def is_wanted(backend: Backend) -> bool:
    """Whether packs of this store are to have sidecars."""
    return backend.exists(WANTED)


def require() -> None:
    """Raises UsageError, with what to do, where parity can't be made."""
    _zfec()


def want(backend: Backend) -> None:
    """From here on whoever adds packs covers them.  Raises UsageError without `zfec`."""
    require()
    backend.replace(WANTED, b"Every pack of this store has a parity file beside it; see docs/format.md.\n")


def sidecars(backend: Backend) -> Iterator[str]:
    """The packs that sidecars are named for."""
    for folder in backend.names("packs"):
        for name in backend.names(f"packs/{folder}"):
            if name.endswith(packs.PARITY_SUFFIX):
                yield name.removesuffix(packs.PARITY_SUFFIX)


def drop(backend: Backend) -> int:
    """No pack has a sidecar, and none gets one, when this returns; how many had."""
    backend.remove(WANTED)
    names = list(sidecars(backend))
    for name in names:
        backend.remove(packs.parity_of(name))
    return len(names)


def made(data: bytes) -> bytes:
    """The sidecar of a pack."""
    front = _Front(DATA_SHARDS, PARITY_SHARDS, BLOCK_BYTES, len(data), blake3.blake3(data).digest())
    shards = _split(front, data)
    numbers = list(range(front.data, front.data + front.parity))
    parity = _zfec().Encoder(front.data, front.data + front.parity).encode([s.tobytes() for s in shards], numbers)
    head = HEAD.pack(MAGIC, front.data, front.parity, 0, front.block, front.length, front.name)
    sums = b"".join(_sums(front, part) for part in [*(s.tobytes() for s in shards), *parity])
    body = head + sums
    body += blake3.blake3(body).digest()
    return b"".join([body, *parity, body, len(body).to_bytes(8, "little")])


def _split(front: _Front, data: bytes) -> Shards:
    whole = np.zeros(front.data * front.shard, np.uint8)
    whole[: len(data)] = np.frombuffer(data, np.uint8)
    return whole.reshape(front.data, front.shard)


def _sums(front: _Front, part: bytes) -> bytes:
    view = memoryview(part)
    return b"".join(
        blake3.blake3(view[at : at + front.block]).digest(SUM_BYTES) for at in range(0, front.shard, front.block)
    )


# -- repair --------------------------------------------------------------------------------------------------------------------


def repair(backend: Backend, name: str) -> str:
    """The pack is whole when this returns a sentence; an empty one when it was.  Raises StoreDamage when it can't be mended."""
    path = packs.path_of(name)
    data = _read(backend, path)
    if blake3.blake3(data).hexdigest() == name:
        return ""
    sidecar = _read(backend, packs.parity_of(name))
    front, sums = _front_of(sidecar, name)
    whole, blocks = _mended(front, sums, data, sidecar[front.size : front.size + front.parity * front.shard])
    if blake3.blake3(whole).hexdigest() != name:
        raise StoreDamage(f"Pack {name} can't be mended: what its parity gives is not what it was")
    backend.replace(path, whole)
    return f"{path} was mended with its parity: {blocks} of its blocks of 4 KiB were damaged"


def _read(backend: Backend, path: str) -> bytes:
    """A file as far as it can be read; pieces that the disk refuses are zeroes."""
    try:
        return backend.read(path)
    except FileNotFoundError:
        return b""
    except HvbackupError:
        size = backend.size(path)
        return b"".join(_piece(backend, path, at, min(BLOCK_BYTES, size - at)) for at in range(0, size, BLOCK_BYTES))


def _piece(backend: Backend, path: str, offset: int, length: int) -> bytes:
    try:
        return backend.read_at(path, offset, length).ljust(length, b"\0")
    except HvbackupError:
        return bytes(length)


def _front_of(sidecar: bytes, name: str) -> tuple[_Front, NDArray[np.void]]:
    """Layout and checksums, from either of the two places.  Raises StoreDamage."""
    length = int.from_bytes(sidecar[-8:], "little")
    for start in (0, len(sidecar) - 8 - length):
        if start < 0 or len(sidecar) < start + HEAD.size:
            continue
        magic, data, parity, _, block, size, whose = HEAD.unpack_from(sidecar, start)
        sane = 0 < parity <= data and data + parity <= 256 and 512 <= block <= MiB and 0 < size <= PACK_MAX
        if magic != MAGIC or not sane:
            continue
        front = _Front(data, parity, block, size, whose)
        body = sidecar[start : start + front.size]
        if len(body) != front.size or blake3.blake3(body[:-32]).digest() != body[-32:]:
            continue
        if whose.hex() != name:
            raise StoreDamage(f"The parity beside pack {name} is that of pack {whose.hex()}")
        sums = np.frombuffer(body, f"V{SUM_BYTES}", (data + parity) * front.stripes, HEAD.size)
        return front, sums.reshape(data + parity, front.stripes)
    raise StoreDamage(f"Pack {name} has no parity that can be read")


def _mended(front: _Front, sums: NDArray[np.void], data: bytes, parity: bytes) -> tuple[bytes, int]:
    """(the pack, how many of its blocks were damaged)."""
    data, parity = data[: front.length], parity.ljust(front.parity * front.shard, b"\0")
    shards = np.concatenate([_split(front, data), np.frombuffer(parity, np.uint8).reshape(front.parity, front.shard)])
    found = np.stack([np.frombuffer(_sums(front, s.tobytes()), f"V{SUM_BYTES}") for s in shards])
    good = found == sums
    bad = int((~good[: front.data]).sum())
    for pattern, stripes in _patterns(good):
        if pattern[: front.data].all():
            continue
        chosen = np.flatnonzero(pattern)[: front.data]
        if len(chosen) < front.data:
            lost = front.data - len(chosen)
            raise StoreDamage(
                f"Pack {front.name.hex()} can't be mended: too much of it is damaged, by {lost} blocks in a row"
            )
        _decode(front, shards, chosen, stripes)
    return shards[: front.data].tobytes()[: front.length], bad


def _patterns(good: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """Stripes that have the same blocks left, together."""
    patterns, which = np.unique(good, axis=1, return_inverse=True)
    for number in range(patterns.shape[1]):
        yield patterns[:, number], np.flatnonzero(which.ravel() == number)


def _decode(front: _Front, shards: Shards, chosen: NDArray[np.int64], stripes: NDArray[np.int64]) -> None:
    """The blocks of the pack in these stripes are made again out of the chosen shards."""
    view = shards.reshape(len(shards), front.stripes, front.block)
    # zfec wants each block of the pack that is there at its own place, and others where one is missing.
    order = _in_places(chosen.tolist(), front.data)
    parts = [np.ascontiguousarray(view[n][stripes]).tobytes() for n in order]
    out = _zfec().Decoder(front.data, front.data + front.parity).decode(parts, order)
    for number, part in enumerate(out):
        view[number][stripes] = np.frombuffer(part, np.uint8).reshape(len(stripes), front.block)


def _in_places(chosen: Sequence[int], count: int) -> list[int]:
    extra = [n for n in chosen if n >= count]
    have = set(chosen)
    return [n if n in have else extra.pop(0) for n in range(count)]


def is_whole(backend: Backend, name: str) -> bool:
    """Whether a sidecar is what was written, as far as its own checksums tell."""
    sidecar = _read(backend, packs.parity_of(name))
    try:
        front, sums = _front_of(sidecar, name)
    except StoreDamage:
        return False
    if len(sidecar) != 2 * front.size + front.parity * front.shard + 8:
        return False
    parity = sidecar[front.size : front.size + front.parity * front.shard]
    parts = np.frombuffer(parity, np.uint8).reshape(front.parity, front.shard)
    twice = sidecar[: front.size] == sidecar[-8 - front.size : -8]
    again = twice and int.from_bytes(sidecar[-8:], "little") == front.size
    return again and all(_sums(front, p.tobytes()) == sums[front.data + i].tobytes() for i, p in enumerate(parts))


def _zfec() -> Any:
    try:
        import zfec
    except ImportError:
        raise UsageError("Parity needs the package zfec; install it with: pip install 'hvbackup[parity]'") from None
    return zfec
