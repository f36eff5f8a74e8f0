"""``status.json``: what is told, what stays told, and that telling never ends a run."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.status import (
    STATUS,
    begin_status,
    end_status,
    read_status,
    record_checkpoint,
    status_of,
)


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    begin_status(tmp_path)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.checkpoint, status.ended) == ("running", 0, None, False)
    assert status.pid == os.getpid()
    record_checkpoint(tmp_path, 40, 2, "step-00000040")
    end_status(tmp_path, 75)
    values = json.loads((tmp_path / STATUS).read_text())
    expected = {"state": "preempted", "exit_code": 75, "step": 40, "epoch": 2, "checkpoint": "step-00000040"}
    assert {key: values[key] for key in expected} == expected
    begin_status(tmp_path)  # the same command again: what is done stays done
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code, status.step, status.checkpoint) == ("running", None, 40, "step-00000040")
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


def test_the_first_end_stays(tmp_path: Path) -> None:
    begin_status(tmp_path)
    end_status(tmp_path, 69, "rank 3 on b stopped answering", rank=3)
    end_status(tmp_path, 1, "Connection closed by peer")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code, status.rank) == ("lost", 69, 3)
    assert status.cause == "rank 3 on b stopped answering"


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [(ValueError("no such file"), 2, "no such file"), (RuntimeError("boom"), 1, "RuntimeError: boom")],
)
def test_an_exception_is_the_cause(tmp_path: Path, error: Exception, code: int, cause: str) -> None:
    with pytest.raises(type(error)), status_of(tmp_path, True, (ValueError,)):
        raise error
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code, status.cause) == ("failed", code, cause)


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), status_of(tmp_path, False):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"state": 3}', '{"state": "done", "exit_code": "0"}', '{"step": 1}', "\udcff"]
)
def test_what_cannot_be_read_is_no_status(tmp_path: Path, text: str) -> None:
    (tmp_path / STATUS).write_bytes(text.encode(errors="surrogateescape"))
    assert read_status(tmp_path) is None
    begin_status(tmp_path)
    assert read_status(tmp_path) is not None


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    begin_status(tmp_path)
    before = (tmp_path / STATUS).read_text()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.warns(UserWarning, match="the run goes on"):
            record_checkpoint(tmp_path, 40, 2, "step-00000040")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / STATUS).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


def test_the_end_is_told_where_no_new_file_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_status(tmp_path)
    record_checkpoint(tmp_path, 123456, 2, "step-00123456")

    def full(self: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    end_status(tmp_path, 1, "No space left on device")
    end_status(tmp_path, 0)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.cause, status.step) == ("failed", "No space left on device", 123456)


def test_it_needs_no_torch() -> None:
    code = "import sys, trainers.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
