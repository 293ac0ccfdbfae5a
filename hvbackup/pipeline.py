"""Work on threads, results in order: bounded, and the first error wins."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

Take = Callable[[int], None]  # returns when so many bytes may go


def at_once(_: int) -> None:
    """Nothing is limited."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast bytes may go.  Thread safety: any thread."""

    source: Take = at_once  # asked before so much is read from a hypervisor
    store: Take = at_once  # asked before so much goes into a store, or is read out of it for a restore


Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(items: Iterable[Item], work: Callable[[Item], Result], *, threads: int, depth: int) -> Generator[Result]:
    """Yield `work(item)` in the order of `items`, with at most `depth` items under way.

    When `work` or the consumer fails, no further item is begun and all threads have ended before the error leaves here.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="hvbackup")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= depth:
                yield result(waiting.popleft())
        while waiting:
            yield result(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def result(future: Future[Result], timeout_seconds: float | None = None) -> Result:
    """What `future.result()` gives, waited for where a signal may interrupt us.  Raises TimeoutError.

    A future waits in Python code that takes and gives locks; an interruption between the two would leave one taken, and
    whoever must set the result waiting for ever.
    """
    ended: SimpleQueue[Future[Result]] = SimpleQueue()
    future.add_done_callback(ended.put)
    try:
        return ended.get(timeout=timeout_seconds).result()
    except Empty:
        raise TimeoutError from None


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """What `work` will have given, on a thread of its own that begins at once."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:  # noqa: BLE001 - handed to whoever asks for the result
            future.set_exception(e)

    threading.Thread(target=run, name="hvbackup background").start()
    return future
