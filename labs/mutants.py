"""Planted bugs: each one must turn the tests red, or the tests prove nothing.

    python -m labs.mutants             all of them, a table, and exit code 1 when one survives
    python -m labs.mutants --quick     the few that take seconds
    python -m labs.mutants NAME ...    some of them

A mutant is a piece of text replaced in a temporary copy of the package; the copy's own tests are run, never those of this tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from labs.mutants_browsing import BROWSING
from labs.mutants_copying import COPYING
from labs.mutants_forgetting import FORGETTING
from labs.mutants_libvirt import LIBVIRT
from labs.mutants_service import SERVICE

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 1200
FAILED, NOTHING_RAN = 1, 5  # exit codes of pytest

WALK = "tests/store/test_crash_walk.py::"
FAULTS = "tests/capture/test_faults.py::"
DAMAGE = "tests/store/test_damage.py::"
HEALING = "tests/test_protect_damage.py::"
PROTECT = "tests/test_protect.py::"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One planted bug, and the tests that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    quick: bool = False


MUTANTS = (
    Mutant(
        "file renamed before it is synced",
        "hvbackup/files.py",
        "            self._files.kernel.fsync(self._fd)\n            self._close()\n",
        "            self._close()\n",
        ("tests/test_files.py::test_a_power_cut_after_a_call_returned_takes_nothing",),
        quick=True,
    ),
    Mutant(
        "directory not synced",
        "hvbackup/files.py",
        "            self._named = True\n            self._files.kernel.sync_dir(str(target.parent))\n",
        "            self._named = True\n",
        ("tests/test_files.py::test_a_power_cut_after_a_call_returned_takes_nothing",),
        quick=True,
    ),
    Mutant(
        "new directory not synced",
        "hvbackup/files.py",
        "                return\n            self.kernel.sync_dir(str(path.parent))\n\n    def new(self)",
        "                return\n\n    def new(self)",
        ("tests/test_files.py::test_a_power_cut_after_a_call_returned_takes_nothing",),
    ),
    Mutant(
        "file closed while another thread reads from it",
        "hvbackup/files.py",
        "            return self._handle(name).read_at(offset, length)\n",
        "            fd = self._handle(name).fd\n            return os.pread(fd, length, offset)\n",
        ("tests/test_files.py::test_a_handle_lives_as_long_as_a_thread_reads_with_it",),
    ),
    Mutant(
        "the rest of a log's last block is not written again",
        "hvbackup/store/journal/logfile.py",
        "            self._kernel.write_at(self._fd, self._memory[first:end], self._at + first)\n",
        "            self._kernel.write_at(self._fd, self._memory[self._written : end], self._at + self._written)\n",
        ("tests/store/test_logfile.py::test_nothing_new_needs_no_sync_and_all_is_in_whole_blocks",),
        quick=True,
    ),
    Mutant(
        "a log's memory loses the block that is not whole",
        "hvbackup/store/journal/logfile.py",
        "        rest = bytes(self._memory[whole : self._used])\n",
        "        rest = bytes(self._used - whole)\n",
        ("tests/store/test_logfile.py::test_a_power_cut_takes_nothing_that_was_synced",),
        quick=True,
    ),
    Mutant(
        "what is behind the end of a log is what the memory had there",
        "hvbackup/store/journal/logfile.py",
        "        self._memory[self._used : end] = bytes(end - self._used)\n",
        "        pass\n",
        ("tests/store/test_logfile.py::test_it_changes_from_one_way_to_the_other_in_the_middle_of_a_block",),
        quick=True,
    ),
    Mutant(
        "a failed sync of a log is tried again",
        "hvbackup/store/journal/logfile.py",
        "            self._unsure = True\n",
        "            self._unsure = False\n",
        ("tests/store/test_logfile.py::test_a_failed_sync_is_not_tried_again",),
        quick=True,
    ),
    Mutant(
        "a damaged file of a journal hides all of it",
        "hvbackup/store/journal/history.py",
        "        except StoreDamage as e:\n            self.lost",
        "        except FileExistsError as e:\n            self.lost",
        ("tests/store/test_lost_files.py::test_its_moments_are_not_offered_and_those_that_need_it_are_refused",),
        quick=True,
    ),
    Mutant(
        "later facts laid over a point that ends within a damaged file",
        "hvbackup/store/journal/history.py",
        "(2 if run.name.first == self._begins[run.name.epoch] else 1)",
        "2",
        ("tests/store/test_lost_files.py::test_a_point_one_fact_before_its_end_is_nothing_to_lay_later_facts_over",),
        quick=True,
    ),
    Mutant(
        "a point folded of facts that are not there",
        "hvbackup/fold.py",
        "        parent = history.based(moment)\n",
        "        parent = history.base(moment)\n",
        ("tests/store/test_lost_files.py::test_a_point_one_fact_before_its_end_is_nothing_to_lay_later_facts_over",),
        quick=True,
    ),
    Mutant(
        "numbers of a damaged file of a journal used again",
        "hvbackup/store/journal/recorder.py",
        "        return (name.last or name.first) + FACTS_MAX\n",
        "        return name.last or name.first\n",
        ("tests/store/test_lost_files.py::test_a_life_behind_it_takes_none_of_its_numbers",),
        quick=True,
    ),
    Mutant(
        "a life goes on from tokens of a moment that needs a damaged file",
        "hvbackup/protect/beginning.py",
        "    if history.recorded != last:\n",
        "    if False:\n",
        (f"{HEALING}test_a_point_is_made_of_the_machine_where_none_can_be_made_of_the_journal",),
    ),
    Mutant(
        "a point of a damaged journal tried again for ever",
        "hvbackup/protect/points.py",
        "            s.damaged = True\n",
        "            pass\n",
        (f"{HEALING}test_a_point_is_made_of_the_machine_where_none_can_be_made_of_the_journal",),
    ),
    Mutant(
        "a log that was damaged while it waited is sealed up to the damage",
        "hvbackup/store/journal/journal.py",
        "        if self._index_at() not in (None, end):\n",
        "        if False:\n",
        ("tests/store/test_runs.py::test_a_damaged_frame_takes_the_moments_that_need_it_and_no_others",),
        quick=True,
    ),
    Mutant(
        "the index of a log speaks of what a power cut may take back",
        "hvbackup/store/journal/journal.py",
        "self._good[0] and self._file.synced):",
        "self._good[0]):",
        ("tests/store/test_runs.py::test_no_index_speaks_of_what_is_not_durable",),
        quick=True,
    ),
    Mutant(
        "all of a log that has ended is read",
        "hvbackup/store/journal/runs.py",
        "        if not self._is_known() and self._log.index() is None:\n",
        "        if True:\n",
        ("tests/store/test_runs.py::test_of_a_log_that_has_ended_only_the_index_is_read",),
        quick=True,
    ),
    Mutant(
        "a writer that was replaced between two logs is listened to",
        "hvbackup/store/journal/journal.py",
        "all(n.first < first - 1 for",
        "all(n.first < first for",
        ("tests/store/test_history.py::test_a_fenced_writer_that_was_between_two_logs_is_ignored",),
        quick=True,
    ),
    Mutant(
        "a reader of a log shows what a power cut may take back",
        "hvbackup/store/journal/journal.py",
        "            self._held.sync()  #",
        "            #",
        ("tests/store/test_history.py::test_what_a_reader_shows_is_durable_although_a_block_is_written_again",),
    ),
    Mutant(
        "unfinished files never swept",
        "hvbackup/files.py",
        "            self.kernel.unlink(str(path))\n        except (BlockingIOError",
        "            pass\n        except (BlockingIOError",
        (f"{WALK}test_a_crash_at_every_step_of_a_life",),
    ),
    Mutant(
        "point committed before its packs are sealed",
        "hvbackup/store/store.py",
        "        writer.seal()\n        writer.lease.confirm()\n        self.files.write_new(path, data)\n",
        "        writer.lease.confirm()\n        self.files.write_new(path, data)\n        writer.seal()\n",
        (f"{WALK}test_a_crash_at_every_step_of_a_life",),
    ),
    Mutant(
        "names of a killed run never settled",
        "hvbackup/store/store.py",
        "            self.files.settle()\n",
        "            pass\n",
        (f"{WALK}test_a_killed_run_and_then_a_power_cut",),
    ),
    Mutant(
        "point without a run record never told of",
        "hvbackup/store/store.py",
        "            store._adopt()\n",
        "",
        (f"{WALK}test_a_crash_at_every_step_of_a_life",),
    ),
    Mutant(
        "lease not written before the snapshot",
        "hvbackup/leases.py",
        "self._expiry())\n        self._write(lease)\n        return lease",
        "self._expiry())\n        return lease",
        (f"{WALK}test_a_crash_at_every_step_of_a_life", f"{FAULTS}test_dying_at_every_call_of_the_hypervisor"),
    ),
    Mutant(
        "old checkpoint removed before the commit",
        "hvbackup/capture.py",
        "        store.commit(point, writer)\n",
        "        hypervisor.release(machine, lease.id, [r.token for r in roots if r.token])\n"
        "        store.commit(point, writer)\n",
        (f"{WALK}test_a_crash_at_every_step_of_a_life",),
    ),
    Mutant(
        "release removes the committed checkpoint",
        "hvbackup/capture.py",
        "[d.token for d in point.disks if d.token], outcome)",
        "[], outcome)",
        ("tests/capture/test_lives.py",),
    ),
    Mutant(
        "lease given back although the host could not be cleaned",
        "hvbackup/capture.py",
        "lease if released else None",
        "lease",
        (f"{FAULTS}test_a_host_that_is_gone_when_we_clean_up_is_cleaned_by_the_next_run",),
        quick=True,
    ),
    Mutant(
        "sample claims chunks that nobody stores",
        "hvbackup/capture.py",
        "            if self._compared(readers, base, batch)[3].any():\n",
        "            if self._work(readers, base, batch).changed.any():\n",
        (f"{FAULTS}test_a_lying_tracker_is_found_out_and_the_disk_compared_whole",),
        quick=True,
    ),
    Mutant(
        "claims of a map that could not be made are kept",
        "hvbackup/capture.py",
        "                self._writer.drop_claims()\n",
        "",
        (f"{FAULTS}test_a_lost_map_page_makes_the_disk_be_read_whole_and_nothing_is_missing",),
    ),
    Mutant(
        "what the hypervisor calls unchanged is never sampled",
        "hvbackup/sampling.py",
        "min(count, total)",
        "0",
        (f"{FAULTS}test_a_lying_tracker_is_found_out_and_the_disk_compared_whole",),
    ),
    Mutant(
        "signals raise where a lock was taken that nobody knows of",
        "hvbackup/cli/interrupt.py",
        "importing(frame) or fragile(frame) or finishing(frame) or",
        "importing(frame) or finishing(frame) or",
        ("tests/cli/test_interrupt.py::test_a_signal_waits_where_an_exception_would_be_lost",),
        quick=True,
    ),
    Mutant(
        "the tail of a stream's ring is written byte by byte",
        "hvbackup/target/ring.py",
        "self._words[_TAILS], self._words[_TAILS + 1] = rows, data",
        'struct.pack_into("<2Q", self._map, 8 * _TAILS, rows, data)',
        ("tests/test_stream_target.py::test_no_number_is_torn_between_the_two_that_look_at_it",),
    ),
    Mutant(
        "a lost end of a disk is not looked for",
        "hvbackup/sampling.py",
        "for first, ids in base.leaves_backwards() if len(unchanged) else []:",
        "for first, ids in []:",
        ("tests/capture/test_shrunk.py",),
    ),
    Mutant(
        "last block not padded",
        "hvbackup/capture.py",
        "                area[at + length : at + padded] = bytes(padded - length)\n",
        "",
        ("tests/capture/test_plan.py",),
        quick=True,
    ),
    Mutant(
        "grown tail trusted",
        "hvbackup/capture.py",
        "    if parent_size is not None and parent_size != size:\n",
        "    if False:\n",
        ("tests/capture/test_plan.py",),
    ),
    Mutant(
        "view not verified before the commit",
        "hvbackup/capture.py",
        "[*frozen.notes, *frozen.verify()]",
        "[*frozen.notes]",
        (f"{FAULTS}test_a_view_that_did_not_hold_makes_no_point",),
    ),
    Mutant(
        "nonce constant",
        "hvbackup/store/format/pack.py",
        'return ordinal.to_bytes(12, "little")',
        "return bytes(12)",
        ("tests/store/test_security.py",),
        quick=True,
    ),
    Mutant(
        "salt constant",
        "hvbackup/store/format/pack.py",
        "self._salt = os.urandom(32)",
        "self._salt = bytes(range(32))",
        ("tests/store/test_security.py",),
    ),
    Mutant(
        "chunks not compared with their ids",
        "hvbackup/store/chunks/reader.py",
        "        if blake3.blake3(data, key=key).digest() != chunk:\n",
        "        if False:\n",
        (f"{DAMAGE}test_a_damaged_data_pack_takes_what_needs_its_bytes_and_nothing_else[plain]",),
    ),
    Mutant(
        "pages stored once",
        "hvbackup/store/chunks/writer.py",
        "META_COPIES = 2",
        "META_COPIES = 1",
        (f"{DAMAGE}test_one_damaged_meta_pack_costs_nothing[plain]",),
    ),
    Mutant(
        "dedup by the first 8 bytes of an id",
        "hvbackup/store/index/generation.py",
        '(self.rows["id"][at] == ids[todo]) & ',
        "",
        ("tests/store/test_index.py",),
        quick=True,
    ),
    Mutant(
        "damaged cache of the index believed",
        "hvbackup/store/index/index.py",
        "if x.mapped and not x.holds(chunk)]",
        "if False]",
        (f"{DAMAGE}test_damaged_state_costs_nothing[plain]",),
    ),
    Mutant(
        "buckets of the index off by one",
        "hvbackup/store/index/generations.py",
        "    starts[bucket[which] + 1] +=",
        "    starts[bucket[which]] +=",
        ("tests/store/test_index.py",),
        quick=True,
    ),
    Mutant(
        "word of the filter lost between two pieces",
        "hvbackup/store/index/generations.py",
        "            part[0] = self._open\n",
        "            part[0] = 0\n",
        ("tests/store/test_index.py",),
        quick=True,
    ),
    Mutant(
        "a merge keeps the old numbers of packs",
        "hvbackup/store/index/generations.py",
        '(kept["place"] & offsets) | (new[new >= 0].astype(np.uint64) << np.uint64(OFFSET_BITS))',
        'kept["place"]',
        ("tests/store/test_index.py",),
        quick=True,
    ),
    Mutant(
        "packs that are gone are offered",
        "hvbackup/store/index/index.py",
        "            if name in generation.gone:\n                continue\n",
        "",
        ("tests/store/test_index.py::test_a_large_generation_is_kept_when_few_of_its_packs_go",),
        quick=True,
    ),
    Mutant(
        "packs that were mixed up not noticed",
        "hvbackup/store/index/index.py",
        "return self._reread_changed() or bool(doubtful)",
        "return bool(doubtful)",
        (f"{DAMAGE}test_files_under_each_others_names[plain-data pack]",),
    ),
    Mutant(
        "damaged records not noted by check",
        "hvbackup/store/check/verify.py",
        "            found.damaged.append((offset, str(e)))\n",
        "            pass\n",
        ("tests/store/test_check.py",),
        quick=True,
    ),
    Mutant(
        "a sample takes back what it did not look at",
        "hvbackup/store/check/check.py",
        "self._bad = store.index.damaged\n",
        "self._bad = set()\n",
        ("tests/store/test_check.py::test_samples_get_round_to_everything",),
        quick=True,
    ),
    Mutant(
        "an interrupted check forgets what it found",
        "hvbackup/store/check/check.py",
        "            self._store.index.set_damaged(self._bad)\n            self._ledger.save()\n",
        "            self._ledger.save()\n",
        ("tests/store/test_check.py::test_a_check_that_was_interrupted_goes_on_and_forgets_nothing_it_found",),
        quick=True,
    ),
    Mutant(
        "chunks copied by repack not verified",
        "hvbackup/store/reclaim/repack.py",
        "                records.verify(self._store.ring, plain, group)\n",
        "",
        ("tests/store/test_repack.py::test_a_damaged_record_is_named_and_not_copied",),
        quick=True,
    ),
    Mutant(
        "two packs with the same chunks condemn each other",
        "hvbackup/store/reclaim/repack.py",
        "    unfit = {pack, *without}\n",
        "    unfit = {pack}\n",
        ("tests/store/test_repack.py",),
        quick=True,
    ),
    Mutant(
        "both copies of a page in one new pack",
        "hvbackup/store/reclaim/repack.py",
        "if ids.isdisjoint(frame.ids)), len(self._lanes))",
        "if True), len(self._lanes))",
        ("tests/store/test_repack.py::test_pages_stay_in_two_packs",),
        quick=True,
    ),
    Mutant(
        "parity of another pack applied",
        "hvbackup/store/format/parity.py",
        "        if whose.hex() != name:\n",
        "        if False:\n",
        ("tests/store/test_parity.py",),
        quick=True,
    ),
    Mutant(
        "damaged blocks of a parity file trusted",
        "hvbackup/store/format/parity.py",
        "    good = found == sums\n",
        "    good = found == sums\n    good[front.data :] = True\n",
        ("tests/store/test_parity.py",),
        quick=True,
    ),
    Mutant(
        "signatures not checked",
        "hvbackup/store/format/sealed.py",
        "        ring.verifier.verify(signature, _digest(name, data[: f.HEADER_BYTES], payload))\n",
        "",
        ("tests/store/test_security.py",),
    ),
    Mutant(
        "one damaged copy of a key hides the other",
        "hvbackup/store/format/keys.py",
        'record.get("check") == _digest(record) and ',
        "",
        (f"{DAMAGE}test_one_damaged_copy_of_a_key_costs_nothing",),
    ),
    Mutant(
        "vanished points not noticed",
        "hvbackup/store/format/runs.py",
        "            if not self._backend.exists(file)\n",
        "            if False\n",
        ("tests/store/test_security.py",),
    ),
    *(Mutant(*planted) for planted in (*FORGETTING, *COPYING, *LIBVIRT, *SERVICE, *BROWSING)),
    Mutant(
        "moments in doubt still offered after a lie",
        "hvbackup/protect/cycles.py",
        "                self._doubt(str(e), good or Moment(0, Instant(0)))\n",
        "                pass\n",
        (f"{PROTECT}test_after_a_lie_no_moment_since_the_last_good_sample_is_offered",),
    ),
    Mutant(
        "doubts forgotten with the file they were told in",
        "hvbackup/store/journal/recorder.py",
        ", **carried(self.doubts), **stream",
        ", **stream",
        (f"{PROTECT}test_a_lie_that_a_later_worker_finds_costs_the_same",),
    ),
    Mutant(
        "a log that waits to be sealed laid over newer segments",
        "hvbackup/store/journal/history.py",
        "        for merges, group in itertools.groupby(runs, lambda r: self._merges(r, after, moment)):\n",
        "        runs.sort(key=lambda r: not self._merges(r, after, moment))\n"
        "        for merges, group in itertools.groupby(runs, lambda r: self._merges(r, after, moment)):\n",
        ("tests/store/test_sealing.py::test_a_log_before_a_segment_lies_below_it",),
        quick=True,
    ),
    Mutant(
        "the torn log of a dead writer left as it is",
        "hvbackup/store/journal/sealing.py",
        "        if not logs or logs[-1] != names[-1]:\n",
        "        if True:\n",
        ("tests/store/test_sealing.py::test_whoever_takes_over_waits_for_the_newest_log_alone",),
    ),
    Mutant(
        "a log sealed while the journal is cut comes back",
        "hvbackup/store/journal/window.py",
        "    with exclusive(store, machine):\n",
        "    if True:\n",
        ("tests/store/test_sealing.py::test_a_log_that_points_cover_goes_or_stays_but_does_not_come_back",),
    ),
    Mutant(
        "numbers that a point covers used again",
        "hvbackup/store/journal/recorder.py",
        "        covered = max((p.seq or 0 for p in store.points(machine)), default=0)\n",
        "        covered = 0\n",
        ("tests/store/test_sealing.py::test_no_number_that_a_point_covers_is_used_again",),
    ),
    Mutant(
        "a worker that had to be called stands back again at once",
        "hvbackup/protect/streaming.py",
        "            if ring.calls != calls:\n",
        "            if False:\n",
        ("tests/test_stream_target.py::test_a_worker_stands_back_in_a_burst_and_not_for_a_while_after_it_was_called",),
    ),
    Mutant(
        "a stream goes on with a machine that has moved to another QEMU",
        "hvbackup/hypervisors/qemu_stream.py",
        '        qemu_stop.refuse_elsewhere(self._set.path, status, lambda: wire.one("query-migrate"), kind)\n',
        "",
        ("tests/test_protect_safety.py::test_a_machine_that_moves_to_another_qemu_by_live_migration[StreamWorker]",),
    ),
    Mutant(
        "an idle machine that nobody looks at has moments",
        "hvbackup/protect/streaming.py",
        "        if seen - self._came >= IDLE_SECONDS:",
        "        if time.monotonic() - self._came >= IDLE_SECONDS:",
        ("tests/test_stream_qemu.py::test_an_idle_guest_has_moments_of_looks_that_found_it_there",),
    ),
    Mutant(
        "what a fold has read stays in memory",
        "hvbackup/protect/points.py",
        "        s.store.chunks.forget()\n",
        "",
        ("tests/test_memory.py",),
    ),
    Mutant(
        "a disk that is unplugged is where it was",
        "hvbackup/hypervisors/qemu_seats.py",
        "for seat in then if seat not in now]",
        "for seat in then if seat is now]",
        ("tests/test_protect_bypass.py::test_a_disk_that_is_unplugged_is_none_any_more",),
    ),
    Mutant(
        "a disk that is new is none of ours",
        "hvbackup/hypervisors/qemu_seats.py",
        "for seat in now if seat not in then]",
        "for seat in now if seat is then]",
        ("tests/test_protect_bypass.py::test_a_disk_that_is_new_is_protected_too",),
    ),
    Mutant(
        "another file under the same node is the same disk",
        "hvbackup/hypervisors/qemu_seats.py",
        "    return [seat for seat in same if now[seat].file != then[seat].file]",
        "    return []",
        ("tests/test_protect_bypass.py::test_a_disk_that_is_another_file_under_the_same_name",),
    ),
    Mutant(
        "a bitmap is believed whose node has another file",
        "hvbackup/protect/cycles.py",
        "            if isinstance(e, DiskReplaced):",
        "            if False:",
        ("tests/test_protect_bypass.py::test_a_disk_that_is_another_file_under_the_same_name[cycles]",),
    ),
    Mutant(
        "what a ring holds behind a doubt counts",
        "hvbackup/protect/rings.py",
        "    if any(doubt.holds(told.stream.seq) for doubt in told.doubts):",
        "    if False:",
        ("tests/test_stream_qemu.py::test_what_a_ring_holds_behind_a_doubt_is_no_moment",),
    ),
    Mutant(
        "a write that failed is not on the disk",
        "hvbackup/hypervisors/qemu_stream.py",
        "if count != self._failed.get(d, 0)]",
        "if count < self._failed.get(d, 0)]",
        ("tests/test_protect_bypass.py::test_a_write_that_fails_may_be_half_on_the_disk",),
    ),
    Mutant(
        "a stream's first moments are good before anybody has looked",
        "hvbackup/protect/streaming.py",
        "        self._good = self.newest\n",
        "",
        ("tests/test_protect_bypass.py::test_a_write_past_the_mirror_before_the_first_look_and_after_the_last",),
    ),
    Mutant(
        "a ring that fills during the last look is a bypass",
        "hvbackup/protect/looks.py",
        "            if not self._broke():\n",
        "            if True:\n",
        ("tests/test_stream_qemu.py::test_a_ring_that_fills_during_the_last_look_is_no_bypass",),
    ),
    Mutant(
        "what nobody could look at for long is offered",
        "hvbackup/protect/streaming.py",
        "        self._doubt_unseen()\n",
        "",
        ("tests/test_stream_qemu.py::test_what_nobody_could_look_at_for_long_is_told_and_not_offered[long-ended]",),
    ),
    Mutant(
        "a time in which nobody looked is one in which nobody could",
        "hvbackup/protect/streaming.py",
        "        return ended - began\n",
        "        return time.monotonic() - self._seen[1]\n",
        ("tests/test_stream_qemu.py::test_where_nobody_has_tried_to_look_nothing_is_in_doubt",),
    ),
    Mutant(
        "the head of a file makes tokens new that are in doubt",
        "hvbackup/store/journal/told.py",
        '            if tokens != self.tokens or "doubt" in value or "base" in value:',
        "            if True:",
        ("tests/test_stream_qemu.py::test_what_nobody_could_look_at_for_long_is_told_and_not_offered[long-ended]",),
    ),
    Mutant(
        "points of a stream have no tokens",
        "hvbackup/fold.py",
        "told.named_seq == moment.seq",
        "told.tokens_seq == moment.seq",
        ("tests/test_stream_qemu.py::test_every_point_of_a_stream_has_tokens",),
    ),
    Mutant(
        "a machine that was stopped goes on only if that could be written down",
        "hvbackup/hypervisors/qemu_stream_guard.py",
        "        stopped.append(prefix)\n",
        "        pass\n",
        (
            "tests/test_stream_guest_traps.py::test_a_machine_that_was_stopped_goes_on_whether_or_not_that_could_be_written_down[False-]",
        ),
    ),
    Mutant(
        "nobody is told that no look succeeds",
        "hvbackup/protect/streaming.py",
        "            self._tell_silence(look.silence)\n",
        "            pass\n",
        ("tests/test_stream_qemu.py::test_what_nobody_could_look_at_for_long_is_told_and_not_offered[long-ended]",),
    ),
    Mutant(
        "a bypass is forgotten when the stream breaks off",
        "hvbackup/protect/looks.py",
        "found[0].silence):\n            return found\n",
        "found[0].silence):\n            return []\n",
        ("tests/test_stream_qemu.py::test_a_bypass_that_a_look_had_found_counts_although_the_stream_broke_off_then",),
    ),
    Mutant(
        "a doubt that could not be written is forgotten",
        "hvbackup/protect/setting.py",
        "        self.keep_doubt(doubt, tokens, recorder.epoch)\n",
        "",
        ("tests/test_stream_qemu.py::test_a_doubt_that_could_not_be_written_down_is_what_the_next_life_begins_with",),
    ),
    Mutant(
        "whoever reads no events ends the protection",
        "hvbackup/protect/protection.py",
        "        except Exception as e:  # noqa: BLE001 - a pipe that nobody reads, a full disk\n",
        "        except ZeroDivisionError as e:\n",
        ("tests/test_protect.py::test_who_can_not_be_told_keeps_nobody_from_protecting",),
    ),
    Mutant(
        "nobody looks when a stream ends",
        "hvbackup/protect/streaming.py",
        "            for look in self._looks.last(self.newest):\n",
        "            for look in []:\n",
        ("tests/test_protect_bypass.py::test_a_write_past_the_mirror_before_the_first_look_and_after_the_last",),
    ),
    Mutant(
        "what nobody expected ends a protection",
        "hvbackup/protect/protection.py",
        "            except Exception as e:  # noqa: BLE001",
        "            except HvbackupError as e:  # noqa: BLE001",
        ("tests/test_protect_bypass.py::test_what_nobody_expected_ends_a_life_and_not_the_protection",),
    ),
    Mutant(
        "no point is due for as long as the clock was set back",
        "hvbackup/protect/points.py",
        "or not 0 <= since < self._set.rhythm.fold_every_ns",
        "or not since < self._set.rhythm.fold_every_ns",
        ("tests/test_protect.py::test_a_clock_that_is_set_back_keeps_no_point_from_being_made",),
    ),
    Mutant(
        "a writer goes on with a log that was taken over",
        "hvbackup/store/journal/logfile.py",
        "        if not self._kernel.links(self._fd):\n",
        "        if False:\n",
        ("tests/store/test_history.py::test_a_writer_learns_that_its_log_was_taken_over[encrypted]",),
    ),
    Mutant(
        "a journal is taken over for a machine that is off",
        "hvbackup/protect/beginning.py",
        "        cast(Cycling, setting.hypervisor).refuse_off(setting.machine)\n",
        "        pass\n",
        ("tests/hypervisors/test_libvirt_cycles.py::test_a_machine_that_is_off_leaves_the_journal_alone",),
    ),
    Mutant(
        "a doubt is forgotten where there was an older one",
        "hvbackup/store/journal/told.py",
        'list(dict.fromkeys([*self.doubts, *(Doubt(**d) for d in value.get("doubts", ()))]))',
        '[Doubt(**d) for d in value.get("doubts", ())] or self.doubts',
        ("tests/test_protect.py::test_a_file_that_repeats_other_doubts_takes_none_away",),
    ),
    Mutant(
        "a new doubt is not repeated",
        "hvbackup/store/journal/recorder.py",
        '            self.doubts.append(Doubt(**{"until": seq, "end": int(t), **doubt}))\n',
        "            pass\n",
        ("tests/test_protect.py::test_a_lie_that_a_later_worker_finds_costs_the_same",),
    ),
    Mutant(
        "doubts are repeated for ever",
        "hvbackup/store/journal/history.py",
        "        return [d for d in self.told.doubts if d.until >= oldest or any(map(d.holds, points))]\n",
        "        return self.told.doubts\n",
        ("tests/test_protect.py::test_a_lie_that_a_later_worker_finds_costs_the_same",),
    ),
    Mutant(
        "without a known sample all moments are good",
        "hvbackup/protect/beginning.py",
        "told.good or Moment(0, first.t)",
        "told.good or last",
        ("tests/test_protect.py::test_a_lie_found_where_no_sample_is_known_leaves_no_moment_good",),
    ),
    Mutant(
        "what took long to read is a step of the clock",
        "hvbackup/store/journal/recorder.py",
        "        step = self._steps.step()\n",
        "        self._steps._clock = lambda: int(self.newest.t)\n        step = self._steps.step()\n",
        ("tests/test_protect.py::test_what_takes_long_is_no_step_of_the_clock",),
    ),
    Mutant(
        "a step of the clock is forgotten with the life",
        "hvbackup/protect/beginning.py",
        "setting.sealing, setting.steps)",
        "setting.sealing)",
        ("tests/test_protect.py::test_a_step_of_the_clock_is_told_and_stops_expiry",),
    ),
    Mutant(
        "a journal is not late behind a clock that was set back",
        "hvbackup/store/journal/history.py",
        "        if not self.told.clocks:\n",
        "        if moment:\n",
        ("tests/test_protect.py::test_a_clock_that_is_set_back_keeps_no_point_from_being_made",),
    ),
    Mutant(
        "a point is folded into the past",
        "hvbackup/fold.py",
        "        t = after(parent, frozen.t, outcome)\n",
        "        t = frozen.t\n",
        ("tests/test_protect.py::test_a_clock_that_is_set_back_keeps_no_point_from_being_made",),
    ),
    Mutant(
        "nothing is compared for as long as the clock was set back",
        "hvbackup/protect/samples.py",
        "not 0 <= t - self._compared < COMPARE_EVERY_NS",
        "not t - self._compared < COMPARE_EVERY_NS",
        ("tests/test_protect.py::test_samples_are_compared_whatever_is_done_to_the_clock",),
    ),
    Mutant(
        "a stream does not tell that the clock was set",
        "hvbackup/store/journal/recorder.py",
        "        if each and (step := self._clock_step()):\n",
        "        if not each and (step := self._clock_step()):\n",
        ("tests/test_stream_qemu.py::test_a_clock_that_is_set_is_told_and_followed",),
    ),
    Mutant(
        "a quiet guest has no moments for as long as the clock was set back",
        "hvbackup/protect/streaming.py",
        "        if seen - self._came >= IDLE_SECONDS:",
        "        if t - self.newest.t >= IDLE_SECONDS * SECOND:",
        ("tests/test_stream_qemu.py::test_a_clock_that_is_set_is_told_and_followed",),
    ),
    Mutant(
        "sealing goes on while a guest writes as much as it can",
        "hvbackup/store/journal/recorder.py",
        "                self._sealing.rest(CALM_SECONDS)\n",
        "                pass\n",
        ("tests/store/test_sealing.py::test_sealing_rests_while_a_guest_writes_as_much_as_it_can",),
    ),
    Mutant(
        "a machine kept frozen while the journal's disk stalls",
        "hvbackup/protect/journaling.py",
        "        if self._since == late:\n",
        "        if False:\n",
        (f"{PROTECT}test_a_journal_disk_that_takes_too_long_opens_a_gap",),
    ),
    Mutant(
        "machines of a group go on before all have switched",
        "hvbackup/protect/meeting.py",
        "            while not self._closed[step] and not self._expected <= self._reached[step]:\n",
        "            while False:\n",
        ("tests/test_protect_group.py::test_all_meet",),
    ),
    Mutant(
        "what no point covers goes when the budget runs out",
        "hvbackup/store/journal/window.py",
        "        k for k in range(1, len(pieces)) if any(pieces[k - 1].last_seq <= p < pieces[k].name.first for p in covered)\n",
        "        k for k in range(1, len(pieces))\n",
        ("tests/test_stream_traps.py::test_what_no_point_covers_never_goes_and_a_gap_is_told_of",),
    ),
    Mutant(
        "what points cover stays where no point can be made",
        "hvbackup/protect/points.py",
        "        except HvbackupError as e:  # what earlier points cover may be room enough\n",
        "        except HvbackupError as e:\n            raise\n",
        ("tests/test_stream_traps.py::test_what_no_point_covers_never_goes_and_a_gap_is_told_of",),
    ),
    Mutant(
        "QEMU asked to format an image while others may look",
        "hvbackup/hypervisors/qemu_fleece.py",
        '    qmp.command("blockdev-add", driver="file", node_name=names.file(index), filename=str(path), cache=cache)\n',
        '    qmp.command("blockdev-add", driver="file", node_name=names.file(index), filename=str(path), cache=cache)\n'
        '    options = {"driver": "qcow2", "file": names.file(index), "size": drive.disk.size}\n'
        '    qmp.command("blockdev-create", job_id=f"{names.prefix}c{index}", options=options)\n'
        "    time.sleep(0.1)\n",
        ("tests/hypervisors/test_qemu_looks.py",),
    ),
    Mutant(
        "segments merged across a point",
        "hvbackup/store/journal/merging.py",
        "        and not any(summary.last_seq <= p < next_name.first for p in covered)\n",
        "",
        ("tests/store/test_merging.py::test_a_point_divides_or_its_segments_could_never_go",),
        quick=True,
    ),
    Mutant(
        "parts of a merged segment count again when it goes",
        "hvbackup/store/journal/window.py",
        "                for part in merging.parts_of(store, folder, piece.name):  # first, or they would count again\n",
        "                for part in ():\n",
        ("tests/store/test_journal_crash_walk.py::test_a_crash_at_every_step_of_merging",),
    ),
    Mutant(
        "pages of a table believed",
        "hvbackup/store/format/columns.py",
        "                if crc32(self._body[at : at + PAGE_BYTES]) != int(self._sums[page]):\n",
        "                if False:\n",
        ("tests/store/test_columns.py::test_a_flipped_bit_never_gives_a_wrong_answer",),
        quick=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one mutant."""

    mutant: Mutant
    killed: bool
    by: str  # the first test that failed
    seconds: float


def planted(mutant: Mutant, into: Path) -> None:
    """A copy of the package and its tests, with the bug, exists at `into` when this returns."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("hvbackup", "tests", "labs"):
        shutil.copytree(ROOT / name, into / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", into)
    path = into / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"Mutant {mutant.name}: its text is {text.count(mutant.old)} times in {mutant.file}, not once")
    path.write_text(text.replace(mutant.old, mutant.new))


def judge(mutant: Mutant) -> Verdict:
    """Run the tests of a mutant.  Raises SystemExit when they can't be run."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hvbackup-mutant-") as path:
        planted(mutant, Path(path))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=no",
            "--assert=plain",
            "-p",
            "no:cacheprovider",
            "-m",
        ]
        command += ["not soak"]
        result = subprocess.run(
            [*command, *mutant.tests],
            cwd=path,
            env={"HVBACKUP_LAB": str(ROOT / ".lab"), **os.environ},  # a guest that must be built anew proves nothing
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    if result.returncode not in (0, FAILED):
        raise SystemExit(f"Mutant {mutant.name}: pytest could not run\n{result.stdout}{result.stderr}")
    failed = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    by = failed[0].rpartition("::")[2] if failed else ""
    return Verdict(mutant, bool(failed), by, time.monotonic() - began)


def chosen(names: Sequence[str], *, quick: bool) -> list[Mutant]:
    """The mutants to run.  Raises SystemExit for a name nobody has."""
    unknown = set(names) - {m.name for m in MUTANTS}
    if unknown:
        raise SystemExit(f"No mutant is called {', '.join(sorted(unknown))}")
    return [m for m in MUTANTS if (m.name in names if names else m.quick or not quick)]


def table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as Markdown."""
    rows = [f"| {v.mutant.name} | {v.by if v.killed else '**survived**'} | {v.seconds:.0f} s |" for v in verdicts]
    return "\n".join(["| planted bug | first test that fails | took |", "|---|---|---|", *rows])


def main() -> int:
    """Run mutants and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    verdicts = []
    for mutant in chosen(options.names, quick=options.quick):
        verdicts.append(judge(mutant))
        print(f"{'killed  ' if verdicts[-1].killed else 'SURVIVED'} {mutant.name}", file=sys.stderr, flush=True)
    print(table(verdicts))
    return int(not all(v.killed for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
