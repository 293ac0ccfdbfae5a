"""Planted bugs in browsing files inside disks: partitions, windows, file systems, copies; as in `mutants_forgetting`."""

from __future__ import annotations

from labs.mutants_forgetting import Planted

BROWSE, WINDOW = "hvbackup/recover/browse.py", "hvbackup/recover/window.py"
PARTITIONS, COPYOUT = "hvbackup/recover/partitions.py", "hvbackup/recover/copyout.py"
SYSTEMS = "hvbackup/recover/filesystems"
TEST, LARGE = "tests/recover/test_browse.py::", "tests/recover/test_large_structures.py::"

BROWSING: tuple[Planted, ...] = (
    (
        "files: logical partition counted from the extended one",
        PARTITIONS,
        "                yield from _part(disk, number, at + first, count, sector)\n",
        "                yield from _part(disk, number, base + first, count, sector)\n",
        (f"{TEST}test_a_disk_with_mbr_and_logical_partitions",),
        True,
    ),
    (
        "files: last sector of a partition left out",
        PARTITIONS,
        "first, last - first + 1, sector, text",
        "first, last - first, sector, text",
        (f"{TEST}test_a_disk_with_gpt",),
        False,
    ),
    (
        "files: page that can't be read taken for zeroes",
        WINDOW,
        "        except HvbackupError:\n            return None\n",
        "        except HvbackupError:\n            return bytes(min(PAGE_BYTES, self.size - begin))\n",
        (f"{TEST}test_damage_of_what_describes_files_is_damage",),
        False,
    ),
    (
        "files: damage that a reader swallowed forgotten",
        BROWSE,
        '    if window.error:\n        raise type(window.error)(f"{what}: {window.error}") from window.error\n',
        "",
        (f"{TEST}test_damage_that_a_reader_swallows_is_told",),
        True,
    ),
    (
        "files: folder entered twice",
        BROWSE,
        "        if key in seen or len(folder.path) > PATH_MOST:\n",
        "        if len(folder.path) > PATH_MOST:\n",
        (f"{TEST}test_a_folder_within_itself",),
        False,
    ),
    (
        "files: unwritten extents of ext4 read as they are",
        f"{SYSTEMS}/ext.py",
        "            if count <= UNWRITTEN:\n                yield first, low | high << 32, count\n",
        "            yield first, low | high << 32, count & 0x7FFF\n",
        (f"{LARGE}test_what_was_never_written_reads_as_zeroes",),
        False,
    ),
    (
        "files: unwritten extents of XFS read as they are",
        f"{SYSTEMS}/xfs.py",
        "            if unwritten:\n                continue\n",
        "",
        (f"{LARGE}test_what_was_never_written_reads_as_zeroes",),
        False,
    ),
    (
        "files: compressed extent that is too short accepted",
        f"{SYSTEMS}/btrfs.py",
        "data = data[extent.offset : extent.offset + length]\n        if len(data) < length:\n",
        "data = data[extent.offset : extent.offset + length]\n        if False:\n",
        (f"{LARGE}test_what_is_compressed_wrongly_is_refused",),
        False,
    ),
    (
        "files: part of a damaged file left behind",
        COPYOUT,
        "                os.unlink(name, dir_fd=into)\n                raise\n",
        "                raise\n",
        (f"{TEST}test_of_a_damaged_file_nothing_is_left_and_the_others_are_there",),
        True,
    ),
    (
        "files: written through a link",
        COPYOUT,
        "        try:\n            os.unlink(name, dir_fd=into)\n        except (IsADirectoryError",
        "        try:\n            os.stat(name, dir_fd=into)\n        except (IsADirectoryError",
        (f"{TEST}test_nothing_is_overwritten_unless_that_was_said",),
        False,
    ),
    (
        "files: what is lost before a run not looked at",
        "hvbackup/recover/affected.py",
        "        if before or (i < len(lost) and lost[i][0] < at + length):\n",
        "        if i < len(lost) and lost[i][0] < at + length:\n",
        (f"{TEST}test_which_runs_lie_on_what_is_lost",),
        False,
    ),
)
