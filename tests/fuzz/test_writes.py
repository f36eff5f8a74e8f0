"""Where a run writes, with which permissions, and that no shell ever reads what a recipe says."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = """
epochs: 1
batch_size: 32
data: {source: digits, limit: 64}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
method: {name: simclr, projector: {hidden: 16, output: 8}}
optim: {name: sgd, lr: 0.1}
schedule: {warmup_epochs: 0}
"""
NAME = "run; touch shell-was-here; $(touch shell-was-here) `touch shell-was-here` [bold] & 'x'"


def audited(log: Path, folder: Path, *command: str) -> list[tuple[str, str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder / "home"), "MASTER_PORT": "0"}
    environment |= {
        "TMPDIR": str(folder / "tmp"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/fuzz/audit.py"), str(log), *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        umask=0o027,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_files_are_written_in_the_run_folder_alone_and_no_shell_is_started(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name in ("work", "work/tmp", "work/home", "work/cache"):
        (tmp_path / name).mkdir()
    (work / "recipe.yaml").write_text(RECIPE)
    run = work / "runs" / NAME
    events: list[tuple[str, str]] = []
    for number, command in enumerate(
        (
            (str(ROOT / "train.py"), "recipe.yaml", f"run.dir={json.dumps(str(run))}"),
            (str(ROOT / "evaluate.py"), "knn", str(run), "k=[5]"),
            (str(ROOT / "tools" / "report.py"), str(run)),
        )
    ):
        events += audited(tmp_path / f"{number}.log", work, *command)

    allowed = (run, work / "tmp", work / "home", work / "cache", Path("/dev/null"), Path("/dev/shm"), Path("/proc"))
    # Numba keeps what it compiles of a library beside that library, as the guide says.
    written = [Path(what) for kind, what in events if kind == "file" and "__pycache__" not in what]
    assert run / "recipe.yaml" in [path.with_name("recipe.yaml") for path in written if path.name == ".recipe.yaml.tmp"]
    parents = [run.parent, work]  # made on the way
    outside = sorted(
        {path for path in written if path not in parents and not any(path.is_relative_to(a) for a in allowed)}
    )
    assert outside == []
    assert not list(work.rglob("shell-was-here"))

    assert [what for kind, what in events if kind == "shell"] == []
    for what in (what for kind, what in events if kind == "program"):
        executable, words = json.loads(what)
        # Some library asks a shell for something of its own; nothing of ours may be in it.
        assert "shell-was-here" not in what or not Path(executable).name.endswith("sh"), words
        assert "touch" not in " ".join(words[:1])

    for path in [run, *run.rglob("*")]:
        if path.is_symlink():
            continue
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), f"{path.name}: {mode:o}"


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (("train.py", "nowhere.yaml"), "does not exist"),
        (("train.py", "/dev/zero"), "not a regular file"),
        (("train.py", "recipe.yaml", "epochs=[[["), "the value is not YAML"),
        (("train.py", "recipe.yaml", "a\x1b[2Jb=1"), r"a\x1b[2Jb"),
        (("train.py", "recipe.yaml", "data.source=folder", "data.root=" + "x" * 5_000), "too long"),
        (("evaluate.py", "knn", "weights.pt", "data.source=digits"), "neither a run folder"),
        (("evaluate.py", "knn", "weights.safetensors", "data.source=digits"), "cannot be read as safetensors"),
        (("evaluate.py", "knn", "run", "data.source=digits"), "damaged"),
        (("tools/export.py", "weights.safetensors", "--to", "torchvision"), "cannot be read as safetensors"),
        (("tools/convert.py", "recipe.yaml", "out", "--to", "ffcv"), "neither a folder nor a data source"),
        (("tools/convert.py", "digits", "out", "data.download=[[[", "--to", "ffcv"), "the value is not YAML"),
        (("tools/report.py", "/dev"), "no recipe.yaml"),
    ],
)
def test_every_command_refuses_in_one_line(command: tuple[str, ...], wanted: str, tmp_path: Path) -> None:
    """In this process's children, forked after the imports: a start of Python takes seconds."""
    import runpy

    from tests.fuzz.trials import with_memory

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "weights.safetensors").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("- a\n")
    said = tmp_path / "stderr"

    def run() -> str:
        os.chdir(tmp_path)
        sys.argv = [str(ROOT / command[0]), *command[1:]]
        with said.open("w") as file:
            sys.stderr = file
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                return f"exit {end.code}"
        return "no exit"

    assert with_memory(2_000, run) == "exit 2", said.read_text()
    lines = said.read_text().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert wanted in lines[0]
