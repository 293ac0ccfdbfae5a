"""A libvirt daemon: the one module that speaks to it, each call with a deadline, each refusal one of our errors.

    host = Host("qemu:///system")
    for domain in host.domains():
        domain.name(), domain.xml()

libvirt's calls wait for as long as the daemon likes.  So each one runs on a thread of its own and is left alone when its time is
up; the connection is not used again then.  A daemon that is silent altogether is noticed by keepalive, which frees the thread.

Thread safety: any thread.
"""

from __future__ import annotations

import json
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from xml.sax.saxutils import escape

import libvirt
import libvirt_qemu

from hvbackup.errors import HostUnreachable, NotFound

T = TypeVar("T")

REPLY_SECONDS = 20.0
BEGIN_SECONDS = 75.0  # libvirt itself waits 30 s for its own lock, and freezes and formats for several disks after that
KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 5, 3
_PIECE_BYTES = 256 * 1024  # of a file that is carried over

OFF_LINE, UNSUPPORTED, LOCKED = (
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
    libvirt.VIR_ERR_OPERATION_TIMEOUT,
)
NO_CHECKPOINT, INCONSISTENT = libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT
NOT_NOW, AGENT_SILENT = libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_AGENT_UNRESPONSIVE

_REDEFINE = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
_NO_JOB = (libvirt.VIR_DOMAIN_JOB_NONE, libvirt.VIR_DOMAIN_JOB_COMPLETED)
_ADVICE = {
    libvirt.VIR_ERR_AUTH_FAILED: "we may not connect; run as root, or as a member of the group libvirt",
    libvirt.VIR_ERR_ACCESS_DENIED: "we may not do that; run as root, or as a member of the group libvirt",
    libvirt.VIR_ERR_NO_CONNECT: "there is no such driver on that host; install libvirt-daemon-driver-qemu",
}
_LOST = (libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_INVALID_CONN)
_SOCKET = (
    libvirt.VIR_ERR_SYSTEM_ERROR,
    libvirt.VIR_ERR_INTERNAL_ERROR,
)  # where libvirt's RPC says it: broken pipe, closed, ...


class LibvirtRefused(HostUnreachable):
    """The daemon understood a call and refused it; `code` is libvirt's, `words` are as well."""

    def __init__(self, where: str, what: str, error: libvirt.libvirtError) -> None:
        self.code, self.words = error.get_error_code(), str(error.get_error_message() or error)
        advice = _ADVICE.get(self.code)
        super().__init__(f"libvirt at {where} refused {what}: {self.words}" + (f"; {advice}" if advice else ""))


_EVENTS = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "undefined",
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}
_DETAILS = {
    (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED): "migrated",
    (libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT): "snapshot",
    (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_FROM_SNAPSHOT): "snapshot",
    (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED): "migrated",
    (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_FROM_SNAPSHOT): "snapshot",
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED): "crashed",
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED): "failed",
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED): "migrated",
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT): "snapshot",
}


@dataclass(frozen=True, slots=True)
class Happening:
    """Something libvirt told of a domain, in words."""

    event: str
    detail: str
    uuid: str
    name: str


class _Loop:
    """libvirt's event loop: one for each process, without which no connection is kept alive."""

    lock = threading.Lock()
    running = False

    @classmethod
    def start(cls) -> None:
        with cls.lock:
            if not cls.running:
                libvirt.registerErrorHandler(lambda *_: None, None)  # our errors say it, once
                libvirt.virEventRegisterDefaultImpl()
                threading.Thread(target=cls._run, name="libvirt events", daemon=True).start()
                cls.running = True

    @staticmethod
    def _run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()


class Host:
    """One daemon; connected when it is first asked, and again after it was restarted."""

    def __init__(self, uri: str, reply_seconds: float = REPLY_SECONDS) -> None:
        self.uri = uri
        self._reply_seconds = reply_seconds
        self._lock = threading.Lock()
        self._connection: libvirt.virConnect | None = None

    def call(self, what: str, work: Callable[[libvirt.virConnect], T], seconds: float = 0.0) -> T:
        """What the daemon answers.  Raises NotFound, LibvirtRefused, HostUnreachable."""
        connection = self._connected(seconds)
        return self._run(what, lambda: work(connection), seconds)

    def domains(self) -> Sequence[Domain]:
        """Every domain: running, off and transient."""
        found = self.call("listing domains", lambda c: [d.UUIDString() for d in c.listAllDomains()])
        return [Domain(self, uuid) for uuid in found]

    def capabilities(self) -> str:
        """What the host says of itself, as XML."""
        return self.call("capabilities", lambda c: str(c.getCapabilities()))

    def define(self, xml: str) -> Domain:
        """A new domain, switched off.  Raises LibvirtRefused."""
        return Domain(self, self.call("defining a domain", lambda c: str(c.defineXML(xml).UUIDString())))

    def command_line(self, xml: str) -> str:
        """How QEMU would be started for a domain, as words of a shell.  Raises LibvirtRefused."""
        return self.call("a command line", lambda c: str(c.domainXMLToNative("qemu-argv", xml)))

    def networks(self) -> Sequence[str]:
        """The names of its virtual networks."""
        return self.call("listing networks", lambda c: [str(n.name()) for n in c.listAllNetworks()])

    def put_file(self, path: str, content: bytes, uid: int, gid: int) -> None:
        """A new file on the daemon's host, for this user only.  Raises LibvirtRefused where its storage can't do that."""
        self.call("a new volume", lambda c: _put(c, path, content, uid, gid))

    def remove_file(self, path: str) -> None:
        """There is no such file on the daemon's host; idempotent.  Raises LibvirtRefused."""
        self.call("removing a volume", lambda c: _remove(c, path))

    def watch(self, happened: Callable[[Happening], None], lost: Callable[[], None]) -> Callable[[], None]:
        """Be told what happens to domains, and of the end of the connection; what is returned ends that."""
        connection = self._connected(self._reply_seconds)

        def lifecycle(_: Any, domain: libvirt.virDomain, event: int, detail: int, __: Any) -> None:
            told = Happening(
                _EVENTS.get(event, "other"), _DETAILS.get((event, detail), ""), domain.UUIDString(), domain.name()
            )
            happened(told)

        def disks(_: Any, domain: libvirt.virDomain, *__: Any) -> None:
            happened(Happening("disks", "", domain.UUIDString(), domain.name()))

        def metadata(_: Any, domain: libvirt.virDomain, __: int, namespace: str | None, ___: Any) -> None:
            happened(Happening("metadata", namespace or "", domain.UUIDString(), domain.name()))

        wanted: Mapping[int, Callable[..., None]] = {
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: lifecycle,
            libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE: metadata,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED: disks,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: disks,
            libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2: disks,
        }
        ids = self._listen(connection, wanted, lost)

        def stop() -> None:
            try:
                _within(self._reply_seconds, lambda: _deregister(connection, ids))
            except (libvirt.libvirtError, TimeoutError):
                return  # the connection is gone, and the events with it

        return stop

    def _listen(
        self, connection: libvirt.virConnect, wanted: Mapping[int, Callable[..., None]], lost: Callable[[], None]
    ) -> Sequence[int]:
        """By what numbers events come; an end of the connection is told from before the first.  Raises HostUnreachable."""
        self._run("events", lambda: connection.registerCloseCallback(lambda *_: lost(), None), 0)
        ids: list[int] = []
        try:
            for event, told in wanted.items():
                ids.append(self._run("events", partial(connection.domainEventRegisterAny, None, event, told, None), 0))
            if not connection.isAlive():
                raise HostUnreachable(f"libvirt at {self.uri}: The connection broke; is libvirtd running there?")
        except HostUnreachable:
            with suppress(libvirt.libvirtError, TimeoutError):
                _within(self._reply_seconds, lambda: _deregister(connection, ids))
            raise
        return ids

    def close(self) -> None:
        """The connection is given back; idempotent."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            try:
                _within(2.0, connection.close)
            except (libvirt.libvirtError, TimeoutError):
                return

    def _connected(self, seconds: float) -> libvirt.virConnect:
        with self._lock:
            if self._connection is not None and self._connection.isAlive():
                return self._connection
            self._connection = None
            self._connection = self._run("connecting", self._open, seconds)
            return self._connection

    def _open(self) -> libvirt.virConnect:
        _Loop.start()
        connection = libvirt.open(self.uri)
        connection.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
        return connection

    def _run(self, what: str, work: Callable[[], T], seconds: float) -> T:
        seconds = seconds or self._reply_seconds
        try:
            return _within(seconds, work)
        except TimeoutError as error:
            self._connection = None  # its thread waits for an answer that may never come
            raise HostUnreachable(
                f"libvirt at {self.uri}: No answer within {seconds:g} s (waiting for {what}); "
                "is libvirtd hanging, or another job holding this machine?"
            ) from error
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise NotFound(f"libvirt at {self.uri}: {error.get_error_message()}") from error
            connecting = error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR and self._connection is None
            if connecting or _lost(error):
                raise HostUnreachable(
                    f"libvirt at {self.uri}: Cannot reach the daemon ({error.get_error_message()}); "
                    "is libvirtd running there, and may we connect?"
                ) from error
            raise LibvirtRefused(self.uri, what, error) from error


def _lost(error: libvirt.libvirtError) -> bool:
    """Whether the connection broke, rather than that the daemon refused something.

    A daemon that dies is noticed by isAlive only when the event loop has read the end of its socket; a call before that
    fails as it writes or reads.
    """
    code, of_rpc = error.get_error_code(), error.get_error_domain() == libvirt.VIR_FROM_RPC
    return code in _LOST or (of_rpc and code in _SOCKET)


class Domain:
    """One domain, looked up anew for each call: it may be restarted or redefined, and the daemon as well."""

    def __init__(self, host: Host, uuid: str) -> None:
        self.host, self.uuid = host, uuid

    def name(self) -> str:
        return self._ask("name", lambda d: str(d.name()))

    def active(self) -> bool:
        """Whether a QEMU runs."""
        return self._ask("state", lambda d: bool(d.isActive()))

    def paused_by_error(self) -> bool:
        """Whether the machine stands still because a disk, or our scratch, had no room left."""
        wanted = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
        return self._ask("state", lambda d: list(d.state()) == wanted)

    def resume(self) -> None:
        self._ask("resuming", lambda d: d.resume())

    def xml(self, *, definition: bool = False) -> str:
        """As it runs, or as it would be started next, with secrets."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE | (libvirt.VIR_DOMAIN_XML_INACTIVE if definition else 0)
        return self._ask("its XML", lambda d: str(d.XMLDesc(flags)))

    def capacity(self, disk: str) -> int:
        """The size of a disk as the guest sees it."""
        return self._ask(f"the size of {disk}", lambda d: int(d.blockInfo(disk)[0]))

    # jobs and checkpoints

    def busy(self) -> bool:
        """Whether a job holds the machine: a backup, a migration, ..."""
        try:
            return self._ask("its jobs", lambda d: d.jobInfo()[0] not in _NO_JOB)
        except LibvirtRefused as refused:
            if "job data missing" in refused.words:  # one that begins or ends at this moment *(seen with 9.0)*
                return True
            raise

    def backup_xml(self) -> str:
        """The backup that runs, or "" when there is none."""
        try:
            return self._ask("its backup job", lambda d: str(d.backupGetXMLDesc()))
        except LibvirtRefused as refused:
            if refused.code == libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                return ""
            raise

    def begin_backup(self, backup: str, checkpoint: str, *, formatted: bool) -> None:
        """The moment; with `formatted`, scratch images are there already.  Raises LibvirtRefused."""
        flags = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL if formatted else 0
        self._ask("beginning a backup", lambda d: d.backupBegin(backup, checkpoint or None, flags), BEGIN_SECONDS)

    def abort_job(self) -> None:
        """Ask the job to end; it does so a little later."""
        self._ask("ending the backup", lambda d: d.abortJob())

    def checkpoints(self) -> Mapping[str, str]:
        """Name -> XML of every checkpoint the daemon knows."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
        return self._ask(
            "its checkpoints", lambda d: {c.getName(): c.getXMLDesc(flags) for c in d.listAllCheckpoints()}
        )

    def redefine(self, checkpoint: str) -> None:
        """Tell the daemon of a checkpoint it lost; its bitmaps are looked for.  Raises LibvirtRefused."""
        self._ask("redefining a checkpoint", lambda d: d.checkpointCreateXML(checkpoint, _REDEFINE))

    def delete_checkpoint(self, name: str) -> None:
        """The checkpoint and its bitmaps are gone; idempotent.  Raises LibvirtRefused."""
        self._delete(name, 0)

    def forget_checkpoint(self, name: str) -> None:
        """The daemon knows the checkpoint no more; its bitmaps are left alone."""
        self._delete(name, libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

    def _delete(self, name: str, flags: int) -> None:
        try:
            self._ask("deleting a checkpoint", lambda d: d.checkpointLookupByName(name).delete(flags))
        except LibvirtRefused as refused:
            if refused.code != NO_CHECKPOINT:
                raise

    # the guest

    def filesystems(self) -> Sequence[tuple[str, str, str]]:
        """(mountpoint, type, device) of what is mounted in the guest.  Raises LibvirtRefused, HostUnreachable."""
        found = self._ask("listing file systems", lambda d: d.fsInfo())
        return [(str(row[0]), str(row[2]), str(row[1])) for row in found]

    def system(self) -> str:
        """Which system the guest runs: mswindows, debian, ...; "" when its agent won't say."""
        try:
            found = self._ask("the guest's system", lambda d: d.guestInfo(libvirt.VIR_DOMAIN_GUEST_INFO_OS))
        except LibvirtRefused:
            return ""
        return str(found.get("os.id", ""))

    def freeze(self, mountpoints: Sequence[str], seconds: float) -> int:
        """How many file systems stand still.  Raises LibvirtRefused, HostUnreachable."""
        chosen = list(mountpoints) or None
        return self._ask("freezing the guest", lambda d: int(d.fsFreeze(chosen)), seconds)

    def thaw(self, seconds: float) -> int:
        """How many were let go."""
        return self._ask("thawing the guest", lambda d: int(d.fsThaw(None)), seconds)

    def agent(self, command: str, arguments: Mapping[str, Any], seconds: int) -> Any:
        """What the guest agent answers.  Raises LibvirtRefused, HostUnreachable."""
        asked = json.dumps({"execute": command, "arguments": dict(arguments)})
        answer = self._ask(command, lambda d: libvirt_qemu.qemuAgentCommand(d, asked, seconds, 0), seconds + 5.0)
        return json.loads(answer)["return"]

    def monitor(self, line: str, seconds: float) -> str:
        """What QEMU answers to a command of its own protocol, as it is."""
        return self._ask("a monitor command", lambda d: str(libvirt_qemu.qemuMonitorCommand(d, line, 0)), seconds)

    # its life

    def start(self, *, paused: bool = False) -> None:
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        self._ask("starting", lambda d: d.createWithFlags(flags), BEGIN_SECONDS)

    def undefine(self) -> None:
        """The definition is gone; disks stay."""
        flags = (
            libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
            | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        )
        self._ask("undefining", lambda d: d.undefineFlags(flags))

    def _ask(self, what: str, work: Callable[[libvirt.virDomain], T], seconds: float = 0.0) -> T:
        return self.host.call(what, lambda c: work(c.lookupByUUIDString(self.uuid)), seconds)


def _deregister(connection: libvirt.virConnect, ids: Sequence[int]) -> None:
    for number in ids:
        connection.domainEventDeregisterAny(number)
    connection.unregisterCloseCallback()


@contextmanager
def _pool(connection: libvirt.virConnect, folder: str) -> Iterator[libvirt.virStoragePool]:
    """A folder as a storage pool: the one that it is already, or one that is forgotten afterwards.  Files stay."""
    found = None
    with suppress(libvirt.libvirtError):
        found = connection.storagePoolLookupByTargetPath(folder)
    if found is not None:
        yield found
        return
    name, target = f"hvb-{uuid.uuid4().hex[:12]}", f"<target><path>{escape(folder)}</path></target>"
    made = connection.storagePoolCreateXML(f"<pool type='dir'><name>{name}</name>{target}</pool>", 0)
    try:
        yield made
    finally:
        made.destroy()


def _put(connection: libvirt.virConnect, path: str, content: bytes, uid: int, gid: int) -> None:
    folder, _, name = path.rpartition("/")
    owner = f"<permissions><mode>0600</mode><owner>{uid}</owner><group>{gid}</group></permissions>"
    target = f"<target><format type='raw'/>{owner}</target>"
    size = f"<capacity>{len(content)}</capacity><allocation>0</allocation>"
    with _pool(connection, folder) as pool:
        volume = pool.createXML(f"<volume><name>{escape(name)}</name>{size}{target}</volume>", 0)
        stream = connection.newStream(0)
        volume.upload(stream, 0, len(content), 0)
        try:
            for at in range(0, len(content), _PIECE_BYTES):
                _send(stream, content[at : at + _PIECE_BYTES])
        except BaseException:
            stream.abort()
            raise
        stream.finish()


def _send(stream: libvirt.virStream, piece: bytes) -> None:
    while piece:
        piece = piece[stream.send(piece) :]


def _remove(connection: libvirt.virConnect, path: str) -> None:
    folder, _, name = path.rpartition("/")
    with _pool(connection, folder) as pool:
        pool.refresh(0)  # a pool that was there already may not know what has come since
        try:
            pool.storageVolLookupByName(name).delete(0)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                raise


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result, or the error, of work on a thread of its own.  Raises TimeoutError when it takes longer."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:  # noqa: BLE001  # raised below, by whoever waits
            answers.put((None, error))

    threading.Thread(target=run, name="libvirt call", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]  # None is an answer too
