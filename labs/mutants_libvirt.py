"""Planted bugs in the libvirt adapter, as in `mutants_forgetting`."""

from __future__ import annotations

from labs.mutants_forgetting import Planted

TRAPS = "tests/hypervisors/test_libvirt_traps.py::"
TLS = "tests/hypervisors/test_libvirt_tls.py::"
PULL, REST = "hvbackup/hypervisors/libvirt_pull.py", "hvbackup/hypervisors/libvirt_rest.py"
WATCHDOG = "hvbackup/hypervisors/libvirt_watchdog.py"

LIBVIRT: tuple[Planted, ...] = (
    (
        "libvirt: lost checkpoints not redefined",
        PULL,
        "            there = [t for t in targets if self._redefined(name, [t])]\n",
        "            there = list(targets)\n",
        (f"{TRAPS}test_a_transient_machine_keeps_its_continuity",),
        False,
    ),
    (
        "libvirt: a daemon that died is one that refused",
        "hvbackup/hypervisors/libvirt_host.py",
        " or (of_rpc and code in _SOCKET)",
        "",
        (f"{TRAPS}test_a_daemon_that_dies_is_unreachable_whoever_notices_it",),
        False,
    ),
    (
        "libvirt: files below a disk trusted",
        "hvbackup/hypervisors/libvirt_lineage.py",
        '    if was.get("below") != now.below:\n',
        '    if was.get("below") == "no such":\n',
        (f"{TRAPS}test_a_file_below_a_disk_that_was_written_to_is_noticed",),
        False,
    ),
    (
        "libvirt: broken bitmap of a machine at rest believed",
        REST,
        '    if "in-use" in flags:\n',
        '    if "no-such-flag" in flags:\n',
        (f"{TRAPS}test_a_machine_killed_while_off_backups_are_made_is_compared",),
        False,
    ),
    (
        "libvirt: nobody looks after the scratch",
        WATCHDOG,
        "        if is_here and free_bytes(folder) <= int(reserve_bytes):\n",
        "        if is_here and free_bytes(folder) < 0:\n",
        (f"{TRAPS}test_a_scratch_that_runs_full_costs_the_snapshot_and_not_the_guest",),
        False,
    ),
    (
        "libvirt: backup not ended when its process dies",
        WATCHDOG,
        "        if readable:\n            break\n",
        "        if readable:\n            return 0\n",
        (f"{TRAPS}test_a_backup_whose_process_was_killed_is_ended_by_its_watchdog",),
        False,
    ),
    (
        "libvirt: QEMU formats scratch while others may look",
        PULL,
        "        for path, size in sizes.items():\n            Path(",
        "        return False\n        for path, size in sizes.items():\n            Path(",
        ("tests/hypervisors/test_libvirt_looks.py::test_whoever_looks_while_backups_begin_does_no_harm",),
        False,
    ),
    (
        "libvirt: scratch kept when its process dies",
        WATCHDOG,
        '            if name.endswith(".scratch"):\n',
        "            if not name:\n",
        (f"{TRAPS}test_a_backup_whose_process_was_killed_is_ended_by_its_watchdog",),
        False,
    ),
    (
        "libvirt: QEMU of another host formats scratch while others may look",
        PULL,
        'return "" not in sizes and libvirt_away.put(',
        'return "" in sizes and libvirt_away.put(',
        (f"{TLS}test_whoever_looks_while_backups_begin_on_another_host_does_no_harm",),
        False,
    ),
    (
        "libvirt: scratch on another host forgotten with its machine",
        "hvbackup/hypervisors/libvirt.py",
        "            libvirt_away.remove(self.host, folder)\n",
        "",
        (f"{TLS}test_scratch_of_a_machine_that_is_gone_is_removed_with_its_lease",),
        False,
    ),
    (
        "libvirt: another's job waited for",
        PULL,
        "            self._refuse_busy()\n",
        "",
        (f"{TRAPS}test_somebody_elses_backup_is_busy_at_once",),
        False,
    ),
    (
        "libvirt: another's backup ended",
        PULL,
        "            if self._is_open(prefix):\n                self._abort(prefix)\n",
        "            if self._domain.busy():\n                self._abort(prefix)\n",
        (f"{TRAPS}test_somebody_elses_backup_is_busy_at_once",),
        False,
    ),
    (
        "libvirt: no deadline",
        "hvbackup/hypervisors/libvirt_host.py",
        "        answer, error = answers.get(timeout=seconds)\n",
        "        answer, error = answers.get(timeout=seconds * 100)\n",
        (f"{TRAPS}test_a_daemon_that_hangs_costs_a_few_seconds",),
        False,
    ),
)
