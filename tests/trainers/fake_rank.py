"""A rank without a model, for the tests of the watch: `python -S fake_rank.py RANK RANKS FOLDER ADDRESS TIMEOUT`.

It says "up" once it is watched, then does what it is told on its standard input:
leave: say goodbye and exit; fail: report a failure and exit with 3; lose: say that a collective failed, and exit with
what the watch says; hold: keep the interpreter's lock in C for some seconds; hang: report a failure and not exit.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
from trainers.companion.rank import Watch


def start(rank: int, ranks: int, folder: Path, address: str, timeout: float) -> Watch:
    settings = {
        "rank": rank,
        "pid": os.getpid(),
        "host": f"host{rank}",
        "world_size": ranks,
        "timeout": timeout,
        "grace": 1.0,
        "interval": timeout / 20,
    }
    if rank == 0:
        watch = Watch({**settings, "token": "secret", "port": 0})
        hub = {"addresses": [address], "port": watch.await_first_word("port"), "host": "host0"}
        (folder / "draft").write_text(json.dumps(hub))
        (folder / "draft").replace(folder / "hub")
        watch.complete.wait()
        return watch
    while not (folder / "hub").exists():
        time.sleep(0.01)
    watch = Watch({**settings, "token": "secret", "hub": json.loads((folder / "hub").read_text())})
    watch.await_first_word("connected")
    return watch


def main() -> int:
    rank, ranks, folder, address, timeout = sys.argv[1:]
    watch = start(int(rank), int(ranks), Path(folder), address, float(timeout))
    print("up", watch._process.pid, flush=True)
    for line in sys.stdin:
        match line.split():
            case ["leave"]:
                watch.close()
                return 0
            case ["fail"]:
                watch.fail("a shard is not there", 3)
                print("error: a shard is not there", file=sys.stderr)
                return 3
            case ["lose"]:
                return watch.explain(RuntimeError("Connection closed by peer")).code
            case ["hold", seconds]:
                ctypes.PyDLL(None).usleep(int(float(seconds) * 1e6))
                print("held", flush=True)
            case ["hang"]:
                watch.fail("it hangs", 3)
                time.sleep(1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
