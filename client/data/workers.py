"""Worker processes of the import: prepare studies in parallel, in order, and survive a crashing decoder.

Guarantees: outcomes come in the order of the studies, at most four per worker are under way, a worker's
memory is bounded, and workers die with their parent. It opens no socket (pipes only).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from client.data.prepare import Recipe, prepare_study
from client.data.study import Dropped, Prepared, Reason, SourceStudy


def prepared(
    studies: Iterator[tuple[int, SourceStudy]],
    recipe: Recipe,
    *,
    workers: int,
    prepare: Callable[[SourceStudy, Recipe], Prepared | Dropped] = prepare_study,
) -> Iterator[tuple[int, Prepared | Dropped]]:
    """Yield the outcome of each study in order, over `workers` processes and with a bounded window.

    A study whose decoder kills its process is dropped with a reason; the others go on.
    """
    if workers <= 1:
        for position, source in studies:
            yield position, prepare(source, recipe)
        return
    window: deque[tuple[int, SourceStudy, Future[Prepared | Dropped]]] = deque()
    pool = _pool(workers)
    try:
        exhausted = False
        while window or not exhausted:
            while not exhausted and len(window) < 4 * workers:
                if (entry := next(studies, None)) is None:
                    exhausted = True
                else:
                    window.append((*entry, _submit(pool, prepare, entry[1], recipe)))
            if not window:
                return
            position, source, future = window.popleft()
            try:
                yield position, future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                yield position, _alone(source, recipe, prepare)
                pool = _pool(workers)
                window = deque((at, study, _submit(pool, prepare, study, recipe)) for at, study, _ in window)
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    from multiprocessing import get_context

    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_limit_worker, initargs=(os.getpid(),)
    )


def _limit_worker(parent: int) -> None:
    """Bound the memory of a worker, leave Ctrl-C to the parent, and die with the parent (Linux prctl)."""
    import ctypes
    import resource
    import signal

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _submit(
    pool: ProcessPoolExecutor,
    prepare: Callable[[SourceStudy, Recipe], Prepared | Dropped],
    source: SourceStudy,
    recipe: Recipe,
) -> Future[Prepared | Dropped]:
    """Submit a study; a pool that is already broken gives a future that says so."""
    try:
        return pool.submit(prepare, source, recipe)
    except BrokenProcessPool as error:
        future: Future[Prepared | Dropped] = Future()
        future.set_exception(error)
        return future


def _alone(
    source: SourceStudy, recipe: Recipe, prepare: Callable[[SourceStudy, Recipe], Prepared | Dropped]
) -> Prepared | Dropped:
    """Prepare one suspect study in a process of its own."""
    from client.data.sitekey import study_pseudonym

    pool = _pool(1)
    try:
        return pool.submit(prepare, source, recipe).result()
    except BrokenProcessPool:
        return Dropped(source.where, study_pseudonym(recipe.key, source.study), Reason.IMAGE_CRASHED)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
