"""Planted bugs in forgetting, retention and reclaim: (name, file, text, what it becomes, tests, quick)."""

from __future__ import annotations

Planted = tuple[str, str, str, str, tuple[str, ...], bool]

RETENTION = "tests/store/test_retention.py"
FORGET = "tests/store/test_forget.py::"
RECLAIM = "tests/store/test_reclaim.py::"
WRITERS = "tests/store/test_writers.py::"
WALK = "tests/store/test_reclaim_crash_walk.py"

FORGETTING: tuple[Planted, ...] = (
    (
        "weeks counted by the calendar's year",
        "hvbackup/store/keep/retention.py",
        "    return tuple(_local(point, zone).isocalendar()[:2])\n",
        "    t = _local(point, zone)\n    return (t.year, t.isocalendar()[1])\n",
        (RETENTION,),
        True,
    ),
    (
        "a repeated hour counted as one",
        "hvbackup/store/keep/retention.py",
        "t.hour, t.utcoffset())",
        "t.hour)",
        (RETENTION,),
        False,
    ),
    (
        "days counted in UTC",
        "hvbackup/store/keep/retention.py",
        "    return datetime.fromtimestamp(point.t // SECOND, zone)\n",
        "    return datetime.fromtimestamp(point.t // SECOND, UTC)\n",
        (RETENTION,),
        False,
    ),
    (
        "what is as old as the stretch still within it",
        "hvbackup/store/keep/retention.py",
        "if point.t > since else []",
        "if point.t >= since else []",
        (RETENTION,),
        False,
    ),
    (
        "one period too many kept",
        "hvbackup/store/keep/retention.py",
        "            elif n != UNLIMITED and len(mine) >= n:\n",
        "            elif n != UNLIMITED and len(mine) > n:\n",
        (RETENTION,),
        False,
    ),
    (
        "holds not looked at again",
        "hvbackup/store/keep/forget.py",
        "        kept = must.firm(store, paths, settings, now)\n",
        "        kept: must.Reasons = {}\n",
        (f"{FORGET}test_a_hold_that_comes_between_the_tombstone_and_the_second_look_is_seen",),
        True,
    ),
    (
        "pins ignored by forgetting",
        "hvbackup/store/keep/must.py",
        "    for held in (holds.active(store, now), pins.active(store, now)):\n",
        "    for held in (holds.active(store, now),):\n",
        (f"{FORGET}test_what_must_stay_stays",),
        False,
    ),
    (
        "record of forgetting written after the points are gone",
        "hvbackup/store/keep/forget.py",
        (
            '    store.tell("forget", t.t, forgotten=list(t.points), tombstone=t.id, why=t.why, by=t.by)\n'
            "    lost = []\n    for path in here:\n        if not _to_trash(store, path):\n            lost.append(path)\n"
            "        store.files.remove(path)\n"
        ),
        (
            "    lost = []\n    for path in here:\n        if not _to_trash(store, path):\n            lost.append(path)\n"
            "        store.files.remove(path)\n"
            '    store.tell("forget", t.t, forgotten=list(t.points), tombstone=t.id, why=t.why, by=t.by)\n'
        ),
        (f"{FORGET}test_a_crash_at_every_step_of_forgetting_and_having_back",),
        False,
    ),
    (
        "point removed before it is in the trash",
        "hvbackup/store/keep/forget.py",
        "        if not _to_trash(store, path):\n            lost.append(path)\n        store.files.remove(path)\n",
        (
            "        data = store.files.read(path)\n        store.files.remove(path)\n"
            '        store.files.replace(f"{TRASH}/{path}", data)\n'
        ),
        (f"{FORGET}test_a_crash_at_every_step_of_forgetting_and_having_back",),
        False,
    ),
    (
        "condemned lists not read by writers",
        "hvbackup/store/chunks/writers.py",
        "            lists = list(CONDEMNED.all(self._backend, self._ring))\n",
        "            lists = list(CONDEMNED.all(self._backend, self._ring))[:0]\n",
        (f"{WRITERS}test_nothing_new_refers_to_a_condemned_pack",),
        True,
    ),
    (
        "packs that are gone still referred to",
        "hvbackup/store/chunks/writers.py",
        "        gone = set(index.packs).difference(pack.list_packs(self._backend))\n",
        "        gone: set[str] = set()\n",
        (f"{WRITERS}test_nothing_new_refers_to_a_pack_that_vanished_since_the_index_was_made",),
        False,
    ),
    (
        "point committed although the lease ran out",
        "hvbackup/store/chunks/writers.py",
        "        if self._age() > LEASE_SECONDS:\n",
        "        if False:\n",
        (f"{WRITERS}test_a_lease_that_ran_out_makes_no_point",),
        False,
    ),
    (
        "packs condemned by a guess alone",
        "hvbackup/store/reclaim/reclaim.py",
        "        if chosen is None or chosen:\n",
        "        if chosen is None:\n",
        ("tests/store/test_counts.py::test_a_guess_that_is_too_high_condemns_nothing",),
        True,
    ),
    (
        "blocks that an earlier point keeps guessed to be dead",
        "hvbackup/store/reclaim/counts.py",
        "        unlike &= from_third\n",
        "",
        ("tests/store/test_counts.py::test_a_guess_is_what_a_mark_finds",),
        False,
    ),
    (
        "writers that began before not waited for",
        "hvbackup/store/reclaim/reclaim.py",
        "            if not left or not self._options.wait:\n                return not left\n",
        "            return True\n",
        (RECLAIM.removesuffix("::"),),
        False,
    ),
    (
        "what a writer builds upon not marked",
        "hvbackup/store/reclaim/mark.py",
        "            for root in lease.roots:\n",
        "            for root in ():\n",
        (f"{RECLAIM}test_what_a_writer_builds_upon_stays_although_it_is_forgotten_meanwhile",),
        False,
    ),
    (
        "pins ignored by reclaim",
        "hvbackup/store/reclaim/mark.py",
        "            for root in pin.roots:\n",
        "            for root in ():\n",
        (f"{RECLAIM}test_a_pin_keeps_what_is_read_although_its_point_is_gone",),
        True,
    ),
    (
        "trash ignored by reclaim",
        "hvbackup/store/reclaim/mark.py",
        "chain(points(store, walked), trashed(store, walked))",
        "points(store, walked)",
        (f"{RECLAIM}test_the_trash_is_a_root",),
        False,
    ),
    (
        "packs that another host removed counted as places",
        "hvbackup/store/reclaim/reclaim.py",
        "set(store.index.packs).difference(packs.list_packs(store.files))",
        "set[str]()",
        (f"{RECLAIM}test_an_index_that_knows_packs_that_others_removed_counts_them_for_nothing",),
        False,
    ),
    (
        "pages kept once",
        "hvbackup/store/reclaim/mark.py",
        "        if not self._home(chunk, META_COPIES) and",
        "        if not self._home(chunk, 1) and",
        (f"{RECLAIM}test_pages_and_copies_of_points_stay_in_two_packs",),
        False,
    ),
    (
        "packs removed before what lives in them is durable elsewhere",
        "hvbackup/store/reclaim/repack.py",
        "            output.put(what, frame)\n        if len(self._done.damaged) == before:\n",
        (
            "            output.put(what, frame)\n        self._store.files.remove(packs.path_of(name))\n"
            "        if len(self._done.damaged) == before:\n"
        ),
        (WALK,),
        False,
    ),
    (
        "packs removed whatever lives in them",
        "hvbackup/store/reclaim/reclaim.py",
        "            if len(needed) != len(living) or not repack.replaced(store, pack, needed, unfit):\n",
        "            if len(needed) != len(living):\n",
        (f"{RECLAIM}test_a_damaged_chunk_keeps_its_pack",),
        False,
    ),
    (
        "grace skipped",
        "hvbackup/store/reclaim/reclaim.py",
        "        while self._options.clock() < end:\n",
        "        while False:\n",
        (f"{RECLAIM}test_the_grace_is_waited_for",),
        True,
    ),
    (
        "cache of the index believed by reclaim",
        "hvbackup/store/reclaim/reclaim.py",
        "    store.index.reread()\n",
        "",
        (f"{RECLAIM}test_a_damaged_cache_of_the_index_takes_nothing",),
        False,
    ),
    (
        "doubts ignored by reclaim",
        "hvbackup/store/reclaim/reclaim.py",
        "    if found:\n        more",
        "    if False:\n        more",
        (f"{RECLAIM}test_nothing_is_removed_at_a_doubt",),
        False,
    ),
    (
        "files not made immutable",
        "hvbackup/files.py",
        "        self._files.protect(name)\n",
        "",
        ("tests/store/test_immutable.py",),
        False,
    ),
)
