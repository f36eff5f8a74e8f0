"""Tasks on worker processes: started fresh, watched, and killed when the caller stops for whatever reason.

Not `concurrent.futures`, whose workers cannot be stopped in the middle of a task, nor ask anything of their parent.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from pipelines.stored.images import DataError

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class WorkerError(RuntimeError):
    """A worker process failed or died."""


class Channel:
    """A worker's line to its parent."""

    def __init__(self, send: Callable[[str, Any], Any]) -> None:
        self._send = send

    def progress(self, images: int) -> None:
        self._send("progress", images)

    def ask(self, question: Any) -> Any:
        """The parent's answer."""
        return self._send("ask", question)


Work = Callable[[Any, Channel], Any]  # of a task; a function of a module, to be found by a fresh process


def run_tasks(
    tasks: Iterable[Any],
    work: Work,
    workers: int,
    *,
    answer: Callable[[Any], Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Any]:
    """Results of `work` on each task, as they come.

    Args:
        tasks: pickled one by one when a worker is free.
        work: a function of a module.
        workers: processes; 0: run in this one.
        answer: what `Channel.ask` returns in the worker, computed here.
        progress: told the numbers that workers give to `Channel.progress`.

    Raises:
        WorkerError: the task raised (DataError and OSError by their message, others with the traceback), or its
            process died.
    """

    def handle(kind: str, value: Any) -> Any:
        if kind == "ask" and answer is not None:
            return answer(value)
        if kind == "progress" and progress is not None:
            progress(value)
        return None

    if workers == 0:
        yield from (work(task, Channel(handle)) for task in tasks)
        return
    waiting = iter(tasks)
    context = get_context("spawn")
    processes: dict[Connection, Any] = {}
    try:
        with _one_thread_each():
            for _ in range(workers):
                task = next(waiting, None)
                if task is None:
                    break
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
                _send(processes, ours, task)
        while processes:
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionError) as error:
                    raise _died(processes[connection]) from error
                if kind == "failed":
                    raise WorkerError(value)
                if kind == "ask":
                    _send(processes, connection, handle(kind, value))
                elif kind == "progress":
                    handle(kind, value)
                else:
                    task = next(waiting, None)
                    if task is None:
                        processes.pop(connection).join(0)
                        connection.close()  # the worker ends by itself
                    else:
                        _send(processes, connection, task)
                    yield value
    finally:
        for connection, process in processes.items():
            process.kill()
            process.join()
            connection.close()


def _send(processes: dict[Connection, Any], connection: Connection, value: Any) -> None:
    try:
        connection.send(value)
    except ConnectionError as error:
        raise _died(processes[connection]) from error


def _died(process: Any) -> WorkerError:
    process.join(5)
    killed = ": killed, perhaps for want of memory" if process.exitcode == -signal.SIGKILL else ""
    return WorkerError(
        f"a worker process died (exit code {process.exitcode}{killed}); use fewer --workers if memory was short; the "
        "same command continues where this one stopped"
    )


def _serve(connection: Connection, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides

    def send(kind: str, value: Any) -> Any:
        connection.send((kind, value))
        return connection.recv() if kind == "ask" else None

    try:
        while True:
            task = connection.recv()
            try:
                result = work(task, Channel(send))
            except (EOFError, ConnectionError):
                raise
            except (DataError, OSError) as error:  # a user can mend it: a traceback would only hide it
                connection.send(("failed", str(error)))
                return
            except Exception as error:
                connection.send(("failed", f"{error}\n\n{traceback.format_exc()}"))
                return
            connection.send(("done", result))
    except (EOFError, ConnectionError):
        os._exit(0)  # no more tasks, or the parent is gone


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside get libraries that use one thread: there are enough processes to fill the cores."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
