"""Failures of training that have a known cause: a message for the user in place of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pipelines.sources import DataError
from trainers.memory import is_out_of_memory, memory_message, room_now

if TYPE_CHECKING:
    from trainers.pretrain import Run

# For whoever sees a process die by SIGKILL or SIGBUS that nobody sent.
KILLED_HINT = (
    "killed by SIGKILL, which a system does when its memory runs out (dmesg names the process; a container's limit"
    " counts too): use a smaller batch_size, engine.accumulation, fewer data.workers or data.loader=native"
)
BUS_ERROR_HINT = "ended by SIGBUS: a file mapped into memory was cut off; restore it and set data.os_cache=false"


class TrainingError(RuntimeError):
    """Training cannot go on, for a reason that is known; the message is for the user. ``train.py`` exits with 1."""

    for_user = True  # to be told as it is, without its type


@contextmanager
def known_failures(run: Run) -> Iterator[None]:
    """Inside, what is known to go wrong in training is raised as a TrainingError.

    A DataError before the first step stays one: the input is refused, nothing was trained.
    """
    before = None
    with suppress(OSError, RuntimeError):
        before = room_now(run.engine.ranks.device)
    try:
        yield
    except DataError as error:
        if not run.log.steps_done:
            raise
        raise TrainingError(str(error)) from error
    except TrainingError:  # whatever its words are, such as those of storage that "cannot allocate memory"
        raise
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TrainingError(memory_message(error, run, before)) from error
        if "DataLoader worker" in str(error):  # raised by a signal handler, wherever the main thread stands
            raise TrainingError(f"a process that decodes images died ({error}); {KILLED_HINT}") from error
        raise
