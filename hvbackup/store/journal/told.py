"""What the META facts of a journal say, folded in their order: disks, gaps, marks, doubts, tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hvbackup.model import Consistency, Disk, DiskId, Instant, MachineId


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch in which nothing was recorded: views inside of it are refused."""

    start: Instant
    end: Instant
    why: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A named moment, better than crash-consistent or dear to a person."""

    seq: int
    t: Instant
    label: str
    consistency: str = "crash"


@dataclass(frozen=True, slots=True)
class Moment:
    """A state of a machine that is offered: the barrier `seq`, at `t`."""

    seq: int
    t: Instant


@dataclass(frozen=True, slots=True)
class ClockStep:
    """The wall clock jumped before this moment."""

    seq: int
    t: Instant
    step_ns: int


@dataclass(frozen=True, slots=True)
class Common:
    """A moment that several machines have in common."""

    seq: int
    t: Instant
    id: str
    group: str
    machines: tuple[MachineId, ...]
    spread_ms: float
    left_out: dict[MachineId, str]


@dataclass(frozen=True, slots=True)
class Doubt:
    """Moments after `after`, up to `until`, that may lack changes: none of them is offered."""

    after: int
    until: int
    start: Instant  # the time of `after`
    end: Instant  # the time of `until`
    why: str

    def holds(self, seq: int) -> bool:
        """Whether it is about this moment."""
        return self.after < seq <= self.until


@dataclass(frozen=True, slots=True)
class Streamed:
    """How much of a stream's ring was in the journal at `seq`."""

    ring: str
    rows: int
    seq: int


@dataclass(slots=True)
class Told:
    """What the META facts of a journal say, folded in order."""

    disks: dict[DiskId, Disk] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    clocks: list[ClockStep] = field(default_factory=list)
    commons: list[Common] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    parts: list[Doubt] = field(default_factory=list)  # barriers within a set, which end a file and are no moments
    lost: list[Doubt] = field(default_factory=list)  # what needs a file that can't be read
    good: Moment | None = None  # the newest moment at which the tracker's word was tested
    tokens: dict[DiskId, dict[str, Any]] = field(default_factory=dict)
    tokens_seq: int = -1  # where they were told first
    named_seq: int = -1  # and last
    epoch: int = -1
    stream: Streamed | None = None  # the ring of the newest stream, as it was told last
    base: int = 0  # a view may not build upon a point before this sequence number

    def tell(self, seq: int, t: int, value: dict[str, Any]) -> None:
        """Fold one META fact into what is known."""
        if "disks" in value:
            self.disks = {DiskId(d["id"]): Disk(DiskId(d["id"]), d["size"], d["sector"]) for d in value["disks"]}
            self.doubts = list(dict.fromkeys([*self.doubts, *(Doubt(**d) for d in value.get("doubts", ()))]))
        self.epoch = int(value.get("epoch", self.epoch))
        self.base = int(value.get("base", self.base))
        if "sampled" in value or "base" in value:
            self.good = Moment(seq, Instant(t))
        if doubt := value.get("doubt"):
            found = Doubt(**{"until": seq, "end": t, **doubt})
            if value.get("part"):
                self._part(found)
            else:
                self._doubt(found)
        if gap := value.get("gap"):
            self._gap(Gap(Instant(gap["from"]), Instant(gap.get("to", t)), gap["why"]))
        if mark := value.get("mark"):
            self.marks.append(Mark(seq, Instant(t), mark["label"], mark.get("consistency", "crash")))
        if common := value.get("common"):
            machines = tuple(MachineId(m) for m in common["machines"])
            self.commons.append(
                Common(
                    seq, Instant(t), common["id"], common["group"], machines, common["spread_ms"], common["left_out"]
                )
            )
        if clock := value.get("clock"):
            self.clocks.append(ClockStep(seq, Instant(t), int(clock["step_ns"])))
        if stream := value.get("stream"):
            self.stream = Streamed(str(stream["ring"]), int(stream["rows"]), seq)
        if "tokens" in value:
            tokens = {DiskId(d): token for d, token in value["tokens"].items()}
            # The head of a file repeats them, which proves nothing.
            if tokens != self.tokens or "doubt" in value or "base" in value:
                self.tokens, self.tokens_seq = tokens, seq
            self.named_seq = seq

    def withhold(self, lost: Doubt) -> None:
        """These moments need a file that can't be read."""
        self.lost.append(lost)
        self._unmark(lost)

    def _unmark(self, doubt: Doubt) -> None:
        self.marks = [m for m in self.marks if not doubt.holds(m.seq)]
        self.commons = [c for c in self.commons if not doubt.holds(c.seq)]

    def _doubt(self, doubt: Doubt) -> None:
        self.doubts.append(doubt)
        self._unmark(doubt)
        self._gap(Gap(doubt.start, Instant(doubt.end + 1), doubt.why))

    def _part(self, part: Doubt) -> None:
        """One that follows the same moment as the last one does says more of the same set."""
        if self.parts and self.parts[-1].after == part.after:
            self.parts.pop()
        self.parts.append(part)

    def _gap(self, gap: Gap) -> None:
        """One that begins where the last one does says more of the same."""
        if self.gaps and self.gaps[-1].start == gap.start:
            self.gaps.pop()
        self.gaps.append(gap)

    def consistency(self, seq: int) -> Consistency:
        """How much the guest knew of a moment."""
        return next((Consistency(m.consistency) for m in self.marks if m.seq == seq), Consistency.CRASH)

    @property
    def withheld(self) -> list[Doubt]:
        """Barriers that are not offered."""
        return [*self.doubts, *self.parts, *self.lost]

    @property
    def distrusted(self) -> bool:
        """Whether the newest barrier is in doubt, so that its tokens prove nothing."""
        return any(d.holds(self.tokens_seq) for d in self.doubts)


def carried(doubts: list[Doubt]) -> dict[str, Any]:
    """What the head of each file repeats of doubts, for they must outlive the file they were told in."""
    return {"doubts": [asdict(d) for d in doubts]} if doubts else {}
