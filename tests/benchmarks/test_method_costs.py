"""The benchmark of what methods add to a step runs to its table and its JSON, in tiny."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_it_runs_to_its_table(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    options = ["--small", "--rounds", "1", "--only", "nnclr", "--json", str(results)]
    command = [sys.executable, "benchmarks/method_costs.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "added, ms" in done.stdout
    found = json.loads(results.read_text())
    assert found["machine"]["threads"] == 1
    assert [row["case"].split(":")[0] for row in found["rows"]] == ["nnclr"]
    assert all(row["share"] > 0 and row["step_cpu_ms"] > 0 and row["added_cpu_ms"] > 0 for row in found["rows"])
