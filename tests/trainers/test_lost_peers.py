"""What a rank says and exits with when another one goes wrong: real gloo, two ranks, no model."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("forked_ranks.py")
LOST = 69


@pytest.fixture(scope="module")
def played() -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    played: dict[str, Any] = json.loads(done.stdout)
    return played


RANK = r"rank {} \(pid \d+, host .*\)"
ENDED = "ended without a word: killed (out of memory?) or crashed"
IN_VAIN = "waited for the others in vain, none of them known to be gone: "


@pytest.mark.parametrize(
    ("scenario", "codes", "culprit", "cause"),
    [
        ("raises", [1, 1], 1, "failed: ZeroDivisionError: of rank 1"),
        ("refuses", [2, 2], 0, "failed: this is; no recipe"),
        ("dies", [LOST, 9], 1, ENDED),
        ("waits", [LOST, 9], 1, ENDED),
        ("sleeps_through_a_step", [LOST, LOST], 0, IN_VAIN + "Timed out waiting 2000ms for recv operation to complete"),
    ],
)
def test_one_line_names_the_first_cause(played: Any, scenario: str, codes: list[int], culprit: int, cause: str) -> None:
    scene = played[scenario]
    assert scene["codes"] == codes, scene
    survivor = 1 - culprit
    line = scene["said"][survivor].splitlines()[0]
    assert re.fullmatch(rf"error: {RANK.format(culprit)} {re.escape(cause)}; rank {survivor} ends", line), line
    assert "Traceback" not in scene["said"][survivor], "what is only a consequence has none"


def test_the_rank_that_fails_speaks_for_itself(played: Any) -> None:
    failed = played["raises"]["said"][1]
    assert failed.startswith("Traceback")
    assert failed.rstrip().endswith("ZeroDivisionError: of rank 1")
    assert "error: " not in failed.replace("ZeroDivisionError: ", "")
    assert played["refuses"]["said"][0] == "error: this is\nno recipe\n"


def test_what_lasts_longer_than_the_timeout_at_the_start_is_no_failure(played: Any) -> None:
    scene = played["is_slow_at_the_start"]
    assert scene["codes"] == [0, 0], scene
    assert scene["seconds"] > 5
    assert scene["said"] == ["", ""]


def test_ranks_that_leave_alike_say_nothing_of_each_other(played: Any) -> None:
    scene = played["leaves_together"]
    assert scene["codes"] == [2, 2], scene
    assert not any("error: rank" in said for said in scene["said"])


def test_ranks_that_do_not_come(played: Any) -> None:
    assert played["comes alone"]["codes"] == [LOST, 0]
    assert played["comes alone"]["said"][0].startswith("error: not all ranks came within 3 s (engine.start_timeout)")
    early = played["fails before it joins"]
    assert early["codes"] == [2, 2], early
    assert re.fullmatch(rf"error: {RANK.format(1)} failed: the recipe is not here; rank 0 ends\n", early["said"][0]), (
        early
    )


def test_a_port_in_use_is_refused(played: Any) -> None:
    scene = played["port in use"]
    assert scene["codes"] == [2, 2], scene
    for said in scene["said"]:
        assert re.match(r"error: .*engine.watch_port=\d+ cannot be used on .*Address already in use", said), said
        assert said.count("\n") == 1, said


def test_the_cause_can_be_recorded_before_the_end(played: Any) -> None:
    said = played["waits"]["said"][0]
    assert re.search(rf"before the end: {LOST} rank 1 .* {re.escape(ENDED)}", said), said
