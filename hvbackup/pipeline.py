"""Work on threads, results in order: bounded, and the first error wins."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
