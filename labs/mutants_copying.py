"""Planted bugs in restores and copies; `labs.mutants` plants them with the others."""

from __future__ import annotations

from labs.mutants_forgetting import Planted

RESTORE = "tests/recover/test_restore.py::"
COPY = "tests/test_replicate.py::"

COPYING: tuple[Planted, ...] = (
    (
        "what an unfinished restore left is believed",
        "hvbackup/recover/restore.py",
        "            elif has[i] and self._holds(data[i * block : (i + 1) * block], ids[i].tobytes()):\n",
        "            elif has[i]:\n",
        (f"{RESTORE}test_whatever_an_unfinished_restore_left_is_not_believed",),
        True,
    ),
    (
        "zeroes are not written over what a target held",
        "hvbackup/recover/restore.py",
        "            if has[i] and not wants[i]:\n                self._target.zero(",
        "            if has[i] and not wants[i] and self._target.blank:\n                self._target.zero(",
        (f"{RESTORE}test_whatever_the_target_held_it_equals_the_disk",),
        False,
    ),
    (
        "restored image named before it is durable",
        "hvbackup/recover/rawtarget.py",
        (
            "            self._kernel.fsync(self._fd)\n            if not self._device:\n"
            "                self._kernel.rename(str(self._written), str(self._path))\n"
        ),
        (
            "            if not self._device:\n                self._kernel.rename(str(self._written), str(self._path))\n"
            "            self._kernel.fsync(self._fd)\n            if not self._device:\n"
        ),
        (f"{RESTORE}test_a_restore_that_dies_at_any_step_goes_on",),
        False,
    ),
    (
        "old image keeps its name while it is overwritten",
        "hvbackup/recover/rawtarget.py",
        (
            "        self._written = path if self._device else path.with_name(path.name + PARTIAL)\n"
            "        if in_place and not self._device and path.exists():\n            take_aside(path, self._kernel)\n"
        ),
        "        self._written = path if self._device or in_place else path.with_name(path.name + PARTIAL)\n",
        (f"{RESTORE}test_a_restore_that_dies_at_any_step_goes_on",),
        False,
    ),
    (
        "translation of ids one row off",
        "hvbackup/store/chunks/translation.py",
        'rows["here"][at[hit]].tobytes()',
        'rows["here"][at[hit] - 1].tobytes()',
        (f"{COPY}test_a_clone_is_not_read_again", f"{COPY}test_many_files_of_what_was_kept_become_one"),
        True,
    ),
    (
        "what was kept of ids never tested",
        "hvbackup/replicate.py",
        "                disk.compare_sample(root, self._rng)\n",
        "                pass\n",
        (f"{COPY}test_what_was_kept_of_ids_and_is_wrong_is_found_out",),
        False,
    ),
    (
        "chunk of a copy taken for granted although the target lacks it",
        "hvbackup/replicate.py",
        "        wanted[np.flatnonzero(known)[self._writer.claim(np.ascontiguousarray(ours[known]))]] = True\n",
        "",
        (f"{COPY}test_a_copied_point_equals_the_original",),
        False,
    ),
    (
        "copied point keeps its place in a journal",
        "hvbackup/replicate.py",
        "seq=None, origin=origin",
        "origin=origin",
        (f"{COPY}test_neither_checkpoints_nor_places_in_a_journal_are_copied",),
        False,
    ),
    (
        "copy that a crash left untold stays untold",
        "hvbackup/store/store.py",
        'for r in recent for p in r.value.get("begun", ())]',
        'for r in recent for p in r.value.get("begone", ())]',
        (f"{COPY}test_a_crash_at_every_step_of_a_copy",),
        False,
    ),
    (
        "base of a copy from another store",
        "hvbackup/replicate.py",
        "            return there if known and self._source.files.exists(self._source.path_of(there)) else None\n",
        "            return there\n",
        (f"{COPY}test_points_of_two_stores_are_kept_apart",),
        False,
    ),
)
