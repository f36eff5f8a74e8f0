"""What `benchmarks/gpu.py` has found so far, on disk after every row, and the time that is left to find more."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NO_TIME = "no time left"


class Record:
    """A JSON object, written to ``path`` whenever it changes: who is killed has lost the row in the making, no more.

    Args:
        path: the file; what it holds is gone on with if ``resumed``.
        seconds: from now until ``in_time`` says no.
        match: the names that ``wanted`` lets through contain this.
    """

    def __init__(self, path: Path, *, resumed: bool, seconds: float = math.inf, match: str = "") -> None:
        self.path, self.match = path, match
        self.deadline = time.monotonic() + seconds
        self.found: dict[str, Any] = json.loads(path.read_text()) if resumed else {}
        self.save()

    def put(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.save()

    def add(self, section: str, row: dict[str, Any]) -> None:
        self.found.setdefault(section, []).append(row)
        self.save()

    def save(self) -> None:
        draft = self.path.with_name(self.path.name + ".tmp")
        draft.write_text(json.dumps(self.found, indent=2) + "\n")
        draft.replace(self.path)

    def in_time(self, seconds: float = 0.0) -> bool:
        """Whether there are as many left."""
        return time.monotonic() + seconds < self.deadline

    def wanted(self, name: str) -> bool:
        return self.match in name

    def attempt(self, measure: Callable[[], dict[str, Any]], *, seconds: float = 0.0) -> dict[str, Any]:
        """What ``measure`` returns or, under ``missing``, why it could not: less than ``seconds`` left, no memory, …"""
        if not self.in_time(seconds):
            return {"missing": NO_TIME}
        try:
            return measure()
        except torch.OutOfMemoryError:
            return {"missing": "does not fit into memory"}
        except ImportError as error:
            return {"missing": f"not installed: {error.name or error}"}
        except Exception as failure:  # the rest is still worth knowing
            return {"missing": f"{type(failure).__name__}: {str(failure)[:300]}"}
        finally:
            gc.collect()  # what failed may hold a model
            if torch.cuda.is_initialized():
                with contextlib.suppress(RuntimeError):  # refused by PyTorch 2.11 for good once a capture has failed
                    torch.cuda.empty_cache()
