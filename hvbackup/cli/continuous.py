"""protect, tag, timeline: machines under continuous protection."""

from __future__ import annotations

import argparse
import getpass
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hvbackup.cli.invocation import session_of
from hvbackup.cli.output import Out, count, duration, parse_size, size
from hvbackup.cli.parser import Verbs, add_verb
from hvbackup.errors import UsageError

if TYPE_CHECKING:
    from hvbackup.model import Machine
    from hvbackup.protect.events import Event, Rhythm
    from hvbackup.service.timeline import Timeline

LINE_SECONDS = 10.0  # between two lines for people
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SECOND = 1_000_000_000

PROTECT = """\
Protect machines continuously, until ctrl-C: every few seconds a moment of each goes into its journal, with all its disks at
once, and now and then one becomes a recovery point.  Every moment can be recovered: see --at of restore, boot and map.
"""
DETAILS = """\
stretches of time: 1s, 5m, 1h30m, 2d; sizes: 512M, 10G, 1T

The interval stretches by itself while a machine writes faster than it can be read without slowing it down.  A host that does
not answer is waited for.  `hvbackup timeline MACHINE` shows what was recorded, `hvbackup tag MACHINE NAME` names a moment.

`hvbackup protect pause MACHINE [--for 30m]` leaves a machine alone, for block jobs, a resize or snapshots of your own: one more
moment is recorded, then nothing of ours is in its way.  `hvbackup protect resume MACHINE` goes on; the timeline shows the gap.
"""


def add(verbs: Verbs) -> None:
    """The verbs of this module."""
    verb = add_verb(verbs, "protect", "record every moment of running machines, until ctrl-C", PROTECT, DETAILS)
    verb.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="as for `backup`: qemu:/run/vm/qmp.sock; or `pause MACHINE`, `resume MACHINE`",
    )
    verb.add_argument(
        "--for", dest="for_", default="0", metavar="TIME", help="pause: for so long (default: until resume)"
    )
    verb.add_argument("--why", default="", metavar="TEXT", help="pause: what the gap in the timeline is called")
    verb.add_argument("--every", default="", metavar="TIME", help="between two moments (default: 5s)")
    verb.add_argument(
        "--stream", action="store_true", help="every write is a moment: see docs/continuous.md for what it costs"
    )
    verb.add_argument(
        "--fsync", default="", metavar="TIME", help="with --stream: what a power cut may take (default: 100ms)"
    )
    verb.add_argument("--fold", default="1h", metavar="TIME", help="between two recovery points (default: 1h)")
    verb.add_argument(
        "--window", default="24h", metavar="TIME", help="how long moments are kept (default: 24h; 0: for ever)"
    )
    verb.add_argument(
        "--journal-budget", default="0", metavar="SIZE", help="room for moments, per machine (default: any)"
    )
    verb.add_argument(
        "--sample", type=int, default=8, metavar="N", help="pieces to read again at each moment, per disk (default: 8)"
    )
    verb.add_argument(
        "--freeze-every",
        default="0",
        metavar="TIME",
        help="between two moments with frozen file systems (default: none)",
    )
    verb.add_argument("--group", default="", metavar="NAME", help="these machines have moments in common, common:NAME")
    verb.add_argument("--common-every", default="1m", metavar="TIME", help="between two common moments (default: 1m)")
    verb.add_argument("--name", default="", metavar="NAME", help="what people call the machine")
    verb.add_argument("--disk", action="append", default=[], metavar="DISK", help="only this disk; may be repeated")
    only = "only this machine of the source; may be repeated"
    verb.add_argument("--only", action="append", default=[], metavar="MACHINE", help=only)
    verb.set_defaults(run=protect)
    verb = add_verb(verbs, "tag", "give the present moment of a protected machine a name")
    verb.add_argument("machine", metavar="MACHINE", help="its name or id")
    verb.add_argument("label", metavar="NAME", help='such as "before upgrade"; later: --at "tag:before upgrade"')
    verb.add_argument(
        "--consistency",
        choices=["crash", "filesystem", "application"],
        default="crash",
        help="how much the guest knows of it",
    )
    verb.set_defaults(run=tag)
    verb = add_verb(verbs, "timeline", "show which moments of a machine can be recovered")
    verb.add_argument("machine", metavar="MACHINE", help="its name or id")
    verb.add_argument("--since", default="", metavar="TIME", help="how far back, such as 2h (default: everything)")
    verb.set_defaults(run=timeline)


def stretch(text: str) -> int:
    """Nanoseconds of `5s`, `1h30m`, `500ms`; a bare number is seconds.  Raises UsageError."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return round(float(text) * _SECOND)
    if found := re.fullmatch(r"(\d+)ms", text):
        return int(found[1]) * 1_000_000
    if not re.fullmatch(r"(\d+[smhdw])+", text):
        raise UsageError(f"{text} is no stretch of time; write 5s, 10m, 1h30m or 2d")
    return sum(int(n) * _UNITS[unit] for n, unit in re.findall(r"(\d+)([smhdw])", text)) * _SECOND


def _rhythm(args: argparse.Namespace) -> Rhythm:
    from hvbackup.protect.events import Rhythm
    from hvbackup.store.journal.window import Limits

    if (args.stream and args.every) or (args.fsync and not args.stream):
        raise UsageError("--every is for moments in turn, --fsync for --stream, which makes every write a moment")
    every, fold = stretch(args.fsync or "100ms" if args.stream else args.every or "5s"), stretch(args.fold)
    if args.stream and not _SECOND // 100 <= every <= 10 * _SECOND:
        raise UsageError("--fsync is between 10ms and 10s; 50ms to 200ms are sensible")
    if fold < every or (every < _SECOND // 2 and not args.stream):
        raise UsageError("--every is at least 500ms, and --fold is not shorter")
    freeze = stretch(args.freeze_every)
    if args.stream and (freeze or args.group):
        raise UsageError("--stream leaves the guest alone: its moments are of one machine, and crash-consistent")
    if freeze and freeze < every:
        raise UsageError("--freeze-every is not shorter than --every")
    if args.sample < 0:
        raise UsageError("--sample is a number of pieces, or 0 for none")
    return Rhythm(
        every, fold, Limits(stretch(args.window), parse_size(args.journal_budget)), freeze, args.sample, args.stream
    )


# -- protect -----------------------------------------------------------------------------------------------------------------


def protect(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup protect SOURCE…`, `protect pause MACHINE`, `protect resume MACHINE`."""
    from hvbackup.service import protection as service

    if args.source[0] in ("pause", "resume"):
        return _leave(args, out)
    if stretch(args.for_) or args.why:
        raise UsageError("--for and --why are for `hvbackup protect pause MACHINE`")
    common = stretch(args.common_every)
    if common < _SECOND:
        raise UsageError("--common-every is at least 1s: all machines of the group stand still for it")
    request = service.Request(args.source, args.name, args.disk, args.only, _rhythm(args), args.group, common)
    teller = _Teller(out)
    workers: list[service.Worker] = []
    try:
        with service.protecting(session_of(args), request, teller) as workers:
            alive = list(workers)
            while alive:
                time.sleep(0.2)
                ended = [w for w in alive if not (w.thread and w.thread.is_alive())]
                alive = [w for w in alive if w not in ended]
                for worker in (w for w in ended if w.error and alive):  # the others go on, and nobody else would say it
                    out.warn(f"{worker.machine.name} is not protected: {worker.error}")
    except KeyboardInterrupt:
        out.say("")  # ctrl-C is how this ends
    errors = [w.error for w in workers if w.error]
    for error in errors[1:]:
        out.error(error)
    return out.fail(errors[0]) if errors else 0


def _leave(args: argparse.Namespace, out: Out) -> int:
    from hvbackup.moments import local
    from hvbackup.service import protection as service
    from hvbackup.service import shapes_continuous as shapes

    if len(args.source) != 2:
        raise UsageError(f"Write `hvbackup protect {args.source[0]} MACHINE`")
    if args.source[0] == "pause":
        why = args.why or f"an administrator ({getpass.getuser()}) asked for it"
        found = service.pause(session_of(args), args.source[1], stretch(args.for_), why)
    else:
        found = service.resume(session_of(args), args.source[1])
    name = found.machine.name
    if found.pause:
        until = f"until {local(found.pause.until)}" if found.pause.until else f"until `hvbackup protect resume {name}`"
        line = f"{name} is left alone {until}"
    else:
        line = f"{name} is protected again"
    out.answer(shapes.left(found), [line if found.worker else f"{line}, but no worker runs here"])
    if not found.done:
        out.warn(f"{name}: its worker has not done that yet; `hvbackup timeline {name}` shows when it has")
    return 0


class _Teller:
    """What happens, as lines for people now and then, or as an object each time.  Thread safety: any thread."""

    def __init__(self, out: Out) -> None:
        self._out, self._lock = out, threading.Lock()
        self._heaps: dict[str, _Heap] = {}

    def __call__(self, machine: Machine, event: Event) -> None:
        from hvbackup.protect.events import Cycle, Paused, Streamed, Trouble
        from hvbackup.service import shapes_continuous as shapes

        with self._lock:
            if self._out.json:
                print(json.dumps(shapes.event(machine, event), ensure_ascii=False), flush=True)
                return
            if isinstance(event, Cycle):
                self._out.warn_all([f"{machine.name}: {note}" for note in event.notes])
            if isinstance(event, Cycle | Streamed) and not event.marks:
                heap = self._heaps.setdefault(machine.id, _Heap())
                if line := heap.add(event):
                    self._out.say(f"{machine.name}: {line}")
                return
            if isinstance(event, Paused):
                self._out.say(f"{machine.name}: left alone: {event.pause.why}")
                return
            if isinstance(event, Trouble):
                self._out.warn(f"{machine.name}: nothing is recorded now: {event.error}")
                return
            for line in _event_lines(event):
                self._out.say(f"{machine.name}: {line}")


class _Heap:
    """Cycles since the last line."""

    def __init__(self) -> None:
        self._cycles: list[Any] = []
        self._told = 0.0

    def add(self, cycle: Any) -> str:
        """A line when it is time for one."""
        self._cycles.append(cycle)
        if time.monotonic() - self._told < LINE_SECONDS:
            return ""
        cycles, self._cycles, self._told = self._cycles, [], time.monotonic()
        if hasattr(cycles[-1], "writes"):
            return (
                f"{count(sum(c.writes for c in cycles), 'write')} up to seq:{cycles[-1].moment.seq}, "
                f"{size(sum(c.bytes for c in cycles))}, durable after {1000 * max(c.lag_seconds for c in cycles):.0f} ms at most"
            )
        seconds = sorted(c.seconds for c in cycles)
        read = size(sum(c.read_bytes for c in cycles))
        return (
            f"{count(len(cycles), 'moment')} up to seq:{cycles[-1].moment.seq}, {read} read, "
            f"{1000 * seconds[len(seconds) // 2]:.0f} ms each, the slowest {1000 * seconds[-1]:.0f} ms"
        )


def _event_lines(event: Any) -> Iterator[str]:
    from hvbackup.moments import local
    from hvbackup.protect.events import Begun, Cycle, Folded, Streamed

    if isinstance(event, Begun):
        how = "goes on from its newest moment" if event.how == "resumed" else f"point {event.point.id} was made"
        yield f"protected since {local(event.moment.t)}; {how} in {duration(event.seconds)}"
        if event.gap:
            yield f"nothing was recorded from {local(event.gap['from'])} to {local(event.gap['to'])}: {event.gap['why']}"  # type: ignore[arg-type]
    elif isinstance(event, Folded):
        removed = f", {size(event.removed_bytes)} of the journal removed" if event.removed_bytes else ""
        yield f"point {event.point.id} of {local(event.point.t)} folded in {duration(event.seconds)}{removed}"
    elif isinstance(event, Cycle | Streamed):
        yield f"seq:{event.moment.seq} of {local(event.moment.t)} is {', '.join(event.marks)}"


# -- tag ---------------------------------------------------------------------------------------------------------------------


def tag(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup tag MACHINE NAME`."""
    from hvbackup.model import Consistency, Instant
    from hvbackup.moments import local, rfc3339
    from hvbackup.service import protection

    made = protection.tag(session_of(args), args.machine, args.label, Consistency(args.consistency))
    when = Instant(made.t)
    shown = {"machine": {"id": made.machine.id, "name": made.machine.name}, "tag": made.label, "seq": made.seq}
    out.answer({**shown, "time": rfc3339(when)}, [f"seq:{made.seq} of {local(when)} is {made.label}"])
    return 0


# -- timeline ----------------------------------------------------------------------------------------------------------------


def timeline(args: argparse.Namespace, out: Out) -> int:
    """`hvbackup timeline MACHINE`."""
    from hvbackup.capture import system_clock
    from hvbackup.service import shapes_continuous as shapes
    from hvbackup.service import timeline as service

    now = system_clock()
    found = service.timeline(session_of(args), args.machine, now, stretch(args.since) if args.since else 0)
    out.answer(shapes.timeline(found), _timeline_lines(found))
    out.warn_all(found.notes)
    return 0


def _timeline_lines(found: Timeline) -> Iterator[str]:
    from hvbackup.moments import local

    yield f"{found.machine.name} from {local(found.start)} to {local(found.now)}"
    for band in found.bands():
        yield f"  {band}"
    yield ""
    for s in found.stretches:
        rpo = f"a moment every {duration(s.median_seconds)}, at most {duration(s.longest_seconds)} apart"
        yield f"  {local(s.start)}  {duration((s.end - s.start) / _SECOND)}: {count(s.moments, 'moment')}, {rpo}"
    for line in found.events():
        yield f"  {line}"
    if found.lag_seconds is not None:
        worker = f"process {found.worker}" if found.worker else "NOTHING: no worker runs here"
        yield f"  newest moment {duration(found.lag_seconds)} ago; protected by {worker}"
    if found.pause:
        until = f"until {local(found.pause.until)}" if found.pause.until else "until `hvbackup protect resume`"
        yield f"  PAUSED since {local(found.pause.since)} {until}: {found.pause.why}"
