"""Repair: what is stored twice on purpose is put back where one of the two is damaged or gone.

    keys      `keys/ID.json` and `keys/ID.copy` have the same bytes, and each tells by itself whether it is whole
    points    every point file has a copy in two packs of pages
    packs     those that have parity are made again out of it

Blocks are not here: the next capture stores lost ones again.  Nothing is ever put back that a run record calls forgotten, nor a
copy whose capture never told of its point.

    killed after            left behind                     mended by
    any file put back       the others still damaged        the next repair
"""

from __future__ import annotations

from collections.abc import Iterator

import zstandard

from hvbackup.errors import HvbackupError, KeyRefused, StoreDamage
from hvbackup.store.check.verify import rows_of
from hvbackup.store.format import keys, parity
from hvbackup.store.format import layout as f
from hvbackup.store.format import pack as packs
from hvbackup.store.format import point as points
from hvbackup.store.format.runs import Told
from hvbackup.store.store import Store


def repair(store: Store) -> list[str]:
    """Everything that has a good copy is whole when this returns; what was done, a sentence each.  Only for the owner."""
    store.index.rebuild()
    return [*_keys(store), *_points(store)]


def mend(store: Store) -> list[str]:
    """Packs that check found damaged and that have parity are whole when this returns, as far as it goes.  Only for the owner."""
    covered = set(parity.sidecars(store.files))
    done = [line for name in sorted(covered) if _is_suspect(store, name) for line in _mend(store, name)]
    for name in covered:
        if store.files.exists(packs.path_of(name)) and not parity.is_whole(store.files, name):
            store.files.remove(packs.parity_of(name))
    if parity.is_wanted(store.files):
        made = parity.cover(store.files).made
        done += [f"{made} packs had no parity that is whole, and have it again"] if made else []
    return done


def _is_suspect(store: Store, name: str) -> bool:
    if any(place[0] == name for place in store.index.damaged) or not store.files.exists(packs.path_of(name)):
        return True
    return bool(rows_of(store, name)[1])


def _mend(store: Store, name: str) -> list[str]:
    try:
        line = parity.repair(store.files, name)
    except StoreDamage:
        return []  # too much of it: check names it, and what needs it
    store.index.set_damaged({place for place in store.index.damaged if place[0] != name})
    return [line] if line else []


def _keys(store: Store) -> Iterator[str]:
    names = store.files.names("keys")
    for kid in sorted({name.partition(".")[0] for name in names}):
        both = [f"{kid}.json", f"{kid}.copy"]
        whole = [name for name in both if name in names and _is_whole(store, name)]
        if len(whole) == 1:
            [bad] = set(both) - set(whole)
            store.files.replace(f"keys/{bad}", store.files.read(f"keys/{whole[0]}"))
            yield f"keys/{bad} was put back from {whole[0]}"


def _is_whole(store: Store, name: str) -> bool:
    try:
        keys.read_wrapping(store.files, name)
    except KeyRefused:
        return False
    return True


def _points(store: Store) -> Iterator[str]:
    wanted = _damaged(store) | _vanished(store)
    for path, data in _copies(store) if wanted else ():
        if path in wanted and _reads(store, path, data):
            store.files.replace(path, data)
            wanted.remove(path)
            yield f"{path} was put back from its copy in a pack"


def _damaged(store: Store) -> set[str]:
    paths = (path for folder in store.machine_folders() for path in store.point_paths(folder))
    return {path for path in paths if not _loads(store, path)}


def _loads(store: Store, path: str) -> bool:
    try:
        store.load_point(path)
    except (StoreDamage, FileNotFoundError):
        return False
    return True


def _vanished(store: Store) -> set[str]:
    """Points that a run record tells of, that no record calls forgotten, and that are not there."""
    told = Told()
    for record in store.runs:
        told.tell(record)
    return {path for path in told.expected() if not store.files.exists(path)}


def _copies(store: Store) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every copy of a point that can be decoded."""
    zstd = zstandard.ZstdDecompressor()
    for names, rows in store.index.rows():
        for row in rows[rows["kind"] == f.CHUNK_POINT]:
            try:
                pack, offset = names[int(row["pack"])], int(row["offset"])
                cipher, bind = packs.cipher_of(store.files, store.ring, pack)
                data = store.files.read_at(packs.path_of(pack), offset, int(row["stored"]))
                plain = packs.decode(data, cipher, bind, zstd, f"Pack {pack}: the record at {offset}")
            except (HvbackupError, FileNotFoundError, IndexError):
                continue  # its twin is in another pack
            end = 2 + int.from_bytes(plain[:2], "little")
            yield plain[2:end].decode(errors="replace"), plain[end:]


def _reads(store: Store, path: str, data: bytes) -> bool:
    """Whether this is the point of that name: signed, and of this store."""
    try:
        points.load(store.ring, path, data)
    except StoreDamage:
        return False
    return True
