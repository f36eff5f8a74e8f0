"""Whole training against others: the figures of a row."""

import statistics
import subprocess
import sys

import psutil
import pytest

from benchmarks import end_to_end
from benchmarks.end_to_end import Case, row, turn


def test_a_ratio_is_the_median_over_the_rounds_of_theirs_over_ours() -> None:
    def answer(wall: float, cpu: float) -> dict[str, float]:
        return {"images": 100, "wall": wall, "cpu": cpu, "peak_mb": 10 * wall}

    ours, theirs = [answer(1, 2), answer(2, 2), answer(4, 2)], [answer(3, 2), answer(2, 4), answer(8, 8)]
    found = row(Case("cifar", "stub", 32, 8, steps=1), "plain", theirs, ours)
    assert found["ratio"] == statistics.median([3, 1, 2])
    assert found["cpu_ratio"] == 2
    assert found["images_per_second"] == pytest.approx(100 / 3)
    assert found["peak_mb"] == 80


def test_a_contender_stands_still_between_its_turns() -> None:
    echo = "import sys\nfor _ in sys.stdin: print('{\"wall\": 1}', flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", echo], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert turn(process) == {"wall": 1}
        assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        assert turn(process) == {"wall": 1}
    finally:
        process.kill()
        process.wait()
    assert turn(process) is None


def test_nothing_to_measure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["end_to_end.py"])
    with pytest.raises(SystemExit, match="give --cifar, --photos or both"):
        end_to_end.main()
