"""Compiling at first use: where the library lies, and what happens when that fails."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pipelines.jpeg.decoder
from pipelines.jpeg.c_library import CannotCompileError, c_library
from pipelines.jpeg.decoder import jpeg_decoder, why_no_jpeg_decoder

SOURCE = '#include "answer.h"\nint answer(void) { return ANSWER; }\n'


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(pipelines.jpeg.decoder, "_known", None)
    monkeypatch.setenv("TWINSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answer(folder: Path, *, wanted: int | None = None) -> int:
    """What the library says, compiled if need be; `wanted`: the only answer with which it counts as working."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler")
    (folder / "answer.c").write_text(SOURCE)
    (folder / "answer.h").touch()

    def works(library: ctypes.CDLL) -> str | None:
        return None if wanted in (None, library.answer()) else f"{library.answer()} is wrong"

    return c_library(folder / "answer.c", depends=[folder / "answer.h"], libraries=["m"], works=works).answer()


def test_kept_and_replaced_when_damaged(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "answer.h").write_text("#define ANSWER 42")
    assert answer(tmp_path) == 42
    (kept,) = cache.iterdir()
    content, date = kept.read_bytes(), kept.stat().st_mtime_ns
    assert answer(tmp_path) == 42
    assert kept.stat().st_mtime_ns == date
    middle = len(content) // 2
    for damaged in (content[:middle], content[:middle] + b"damage" + content[middle + 6 :], b""):
        kept.unlink()  # a new file: this process still has the old one in use
        kept.write_bytes(damaged)
        assert answer(tmp_path) == 42
        assert kept.read_bytes() != damaged
        assert list(cache.iterdir()) == [kept]


def test_what_it_is_made_of_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    for value in (1, 2):
        (tmp_path / "answer.h").write_text(f"#define ANSWER {value}")
        assert answer(tmp_path) == value
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr("pipelines.jpeg.c_library._processor", lambda: "another")
    assert answer(tmp_path) == 2
    assert len(list(cache.iterdir())) == 3


def test_one_that_does_not_work_is_not_kept(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "answer.h").write_text("#define ANSWER 3")
    with pytest.raises(CannotCompileError, match="3 is wrong"):
        answer(tmp_path, wanted=4)
    assert list(cache.iterdir()) == []


def test_without_a_folder_to_write_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "answer.h").write_text("#define ANSWER 5")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TWINSTREAM_CACHE", str(tmp_path / "answer.h" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert answer(tmp_path) == 5
    assert list((tmp_path / "temporary").iterdir()) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert jpeg_decoder() is None
    assert why_no_jpeg_decoder() == "there is no C compiler (looked for $CC, cc, gcc and clang)"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("jpeg.c:12:10: fatal error: jpeglib.h: No such file or directory", "libjpeg-dev"),
        ("/usr/bin/ld: cannot find -ljpeg: No such file or directory", "libjpeg-dev"),
        ("note: x\njpeg.c:20:2: error: #error libjpeg-turbo 2.1 or newer is needed\nmore", "2.1 or newer"),
        ("", "no message"),
    ],
)
def test_failing_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, output: str, reason: str
) -> None:
    compiler = tmp_path / "failing-cc"
    compiler.write_text(f"#!/bin/sh\nprintf '%s' '{output}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert jpeg_decoder() is None
    told = why_no_jpeg_decoder()
    assert told is not None
    assert reason in told
    assert "\n" not in told
    assert list(cache.iterdir()) == []


def test_a_compiler_that_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "true")
    assert jpeg_decoder() is None
    assert "cannot be used" in (why_no_jpeg_decoder() or "")


@pytest.mark.slow
def test_many_processes_at_once(cache: Path) -> None:
    if jpeg_decoder() is None:
        pytest.skip(f"the JPEG decoder cannot be built: {why_no_jpeg_decoder()}")
    for file in cache.iterdir():
        file.unlink()
    command = [
        sys.executable,
        "-c",
        "from pipelines.jpeg.decoder import jpeg_decoder; assert jpeg_decoder() is not None",
    ]
    started = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(4)]
    assert [process.wait(120) for process in started] == [0] * 4
    assert len(list(cache.iterdir())) == 1
