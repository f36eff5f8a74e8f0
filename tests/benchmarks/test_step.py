"""The benchmark of what a step adds to the encoder runs to its figures, in tiny, and refuses what it cannot read."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import step


def test_it_runs_to_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.json"
    sizes = ["--size", "resnet8x4:8:2", "resnet8x4:16:4"]
    monkeypatch.setattr(sys, "argv", ["step.py", *sizes, "--rounds", "1", "--json", str(out)])
    step.main()
    rows = json.loads(out.read_text())["steps"]
    assert [(row["arch"], row["pixels"], row["images"]) for row in rows] == [("resnet8x4", 8, 2), ("resnet8x4", 16, 4)]
    for row in rows:
        bare, whole = row["ms"]["encoder forward + backward"], row["ms"]["whole step"]
        assert bare > 0
        assert row["times_encoder"]["whole step"] == pytest.approx(whole / bare)
    assert "resnet8x4, 2 x 4 views of 16" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["resnet18", "resnet9:32:4", "resnet18:0:4", "resnet18:a:b"])
def test_a_size_that_is_none_is_refused(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", "--size", size])
    with pytest.raises(SystemExit, match="2"):
        step.main()
    assert f"--size: '{size}': expected" in capsys.readouterr().err
