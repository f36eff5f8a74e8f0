"""Tasks on worker processes: results, questions, failures, deaths and stops."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time

import pytest

from pipelines.packed.pool import Channel, WorkerError, run_tasks


def die(task: int, channel: Channel) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def fail(task: int, channel: Channel) -> int:
    raise ValueError(f"task {task} is no good")


def double(task: int, channel: Channel) -> int:
    channel.progress(task)
    return 2 * channel.ask(task)


def sleep(task: int, channel: Channel) -> int:
    channel.progress(1)
    time.sleep(600)
    return task


def imported(task: int, channel: Channel) -> list[str]:
    from pipelines.jpeg.decoder import jpeg_decoder
    from pipelines.packed import checking, worker

    assert callable(jpeg_decoder)
    assert checking.check_images is not worker.pack_chunk
    return sorted(sys.modules)


def test_workers_do_without_torch() -> None:
    assert "torch" not in next(run_tasks([0], imported, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_answer_and_are_answered(workers: int) -> None:
    told: list[int] = []
    results = run_tasks(range(5), double, workers, answer=lambda value: value + 10, progress=told.append)
    assert sorted(results) == [20, 22, 24, 26, 28]
    assert sorted(told) == [0, 1, 2, 3, 4]


def test_a_dead_worker_is_an_error() -> None:
    with pytest.raises(WorkerError, match=r"died \(exit code -9: killed"):
        list(run_tasks(range(5), die, 1))
    with pytest.raises(WorkerError, match="task 0 is no good"):
        list(run_tasks(range(5), fail, 1))
    assert multiprocessing.active_children() == []


def refuse(task: int, channel: Channel) -> int:
    raise OSError(28, "No space left on device", "there")


def ask_and_die(task: int, channel: Channel) -> int:
    channel._send.__closure__[0].cell_contents.send(("ask", task))  # type: ignore[attr-defined]
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_what_a_user_can_mend_comes_without_a_traceback() -> None:
    with pytest.raises(WorkerError) as caught:
        list(run_tasks([0], refuse, 1))
    assert str(caught.value) == "[Errno 28] No space left on device: 'there'"


def test_a_worker_that_dies_before_it_is_answered_is_an_error() -> None:
    def answer(question: int) -> bytes:
        time.sleep(0.5)  # until it is dead
        return bytes(1 << 20)

    with pytest.raises(WorkerError, match=r"died \(exit code -9: killed"):
        list(run_tasks([0], ask_and_die, 1, answer=answer))


def test_a_stop_takes_the_workers_along() -> None:
    def interrupt(images: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(range(5), sleep, 1, progress=interrupt))
    assert multiprocessing.active_children() == []
