"""Run a script of the project and write down every file that it opens for writing, and every program that it starts.

python tests/fuzz/audit.py LOG SCRIPT.py arguments …
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

_PATHS = {"os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "os.truncate": 0}


def main() -> None:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(kind: str, what: str) -> None:
        os.write(log, json.dumps([kind, what]).encode() + b"\n")

    def place(path: Any, folder: int = -1) -> str | None:
        if isinstance(path, int):
            return None
        base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
        return os.path.abspath(os.path.join(base, os.fsdecode(path)))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            written = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if written and (named := place(path)) is not None:
                write("file", named)
        elif event in _PATHS:
            below = arguments[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1
            if (named := place(arguments[_PATHS[event]], below)) is not None:
                write("file", named)
        elif event == "subprocess.Popen":
            executable, words = arguments[0], arguments[1]
            write("program", json.dumps([str(executable), [str(word) for word in words]]))
        elif event in ("os.system", "pty.spawn") or event.startswith(("os.exec", "os.posix_spawn")):
            write(
                "shell" if event == "os.system" else "program",
                json.dumps([str(argument) for argument in arguments[:2]]),
            )

    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.getcwd())
    sys.addaudithook(hook)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
