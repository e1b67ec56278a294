"""Many meshes, several processes: a file that kills or stalls its process costs one row, not the run."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from reference_model.convert import prepare_one
from reference_model.sources import Source

Finish = Callable[[Source, dict[str, Any]], None]
Work = Callable[[Source, Path, Mapping[str, Any]], dict[str, Any]]


def run_all(sources: Sequence[Source], out: Path, settings: Mapping[str, Any], finish: Finish, work: Work = prepare_one) -> None:
    """Do `work` for each source in settings["workers"] processes, with a progress bar; `finish` gets the source and its row."""
    from tqdm import tqdm

    todo: queue.SimpleQueue[Source] = queue.SimpleQueue()
    for source in sources:
        todo.put(source)
    failures: list[BaseException] = []
    with tqdm(total=len(sources), unit="mesh", disable=not sources) as bar:
        args = (todo, out, settings, finish, work, bar, failures)
        threads = [threading.Thread(target=_serve, args=args, daemon=True) for _ in range(min(settings["workers"], len(sources)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _serve(
    todo: queue.SimpleQueue, out: Path, settings: Mapping[str, Any], finish: Finish, work: Work, bar: Any, failures: list[BaseException]
) -> None:
    """Feed one process of our own; start another where it was lost."""
    pool = None
    try:
        while not failures:
            source = todo.get_nowait()
            pool = pool or _new_pool()
            task = pool.submit(work, source, out, settings)
            try:
                row = task.result(settings["timeout"])
            except FutureTimeout:
                row = _lost(source, settings, f"took longer than {settings['timeout']} s")
                _end(pool)
                pool = None
            except BrokenProcessPool:
                row = _lost(source, settings, "its process died, perhaps for memory")
                _end(pool)
                pool = None
            finish(source, row)
            bar.update()
    except queue.Empty:
        pass
    except BaseException as error:
        failures.append(error)
    finally:
        if pool:
            _end(pool)


def _new_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_follow_parent)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


def _lost(source: Source, settings: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {
        "source": str(source.path), "licence": source.licence, "resolution": settings["resolution"], "status": "rejected", "reason": reason,
        "seconds": settings["timeout"] if "longer" in reason else "",
    }  # fmt: skip
