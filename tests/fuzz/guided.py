"""Coverage-guided fuzzing of what parses bytes in Python, by atheris: as long as you like.

    pip install -e '.[fuzz]'
    python tests/fuzz/guided.py yaml|tar|tfrecord|beton|index|npz|weights|image [CORPUS] [-max_total_time=600 …]

Anything but the errors that users are shown ends it with the input that did it, in crash-….
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["pipelines", "yaml"]):
    import yaml

    from pipelines.foreign import load_yaml, shortened
    from pipelines.packed.beton import read_beton
    from pipelines.packed.files import find_file
    from pipelines.packed.table import read_index
    from pipelines.packed.tar import scan_tar
    from pipelines.packed.tfrecord import parse_example
    from pipelines.stored.arrays import read_npz
    from pipelines.stored.images import DataError, decode_bytes

SCRATCH = Path(tempfile.mkdtemp())


def _file(data: bytes) -> Path:
    path = SCRATCH / "x"
    path.write_bytes(data)
    return path


def _weights(data: bytes) -> object:
    from trainers.weights import load_metadata, load_tensors

    return load_metadata(_file(data)), load_tensors(_file(data))


TARGETS: dict[str, Callable[[bytes], object]] = {
    "yaml": lambda data: shortened(load_yaml(data.decode("utf-8", "replace"))),
    "tar": lambda data: scan_tar(find_file(_file(data))),
    "tfrecord": parse_example,
    "beton": lambda data: read_beton(find_file(_file(data))),
    "index": lambda data: read_index(data, "it"),
    "npz": lambda data: read_npz(_file(data), ("x_train", "y_train")),
    "weights": _weights,
    "image": lambda data: decode_bytes(data, "it"),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"name one of {', '.join(TARGETS)}")
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with contextlib.suppress(DataError, yaml.YAMLError, ValueError, OSError, KeyError):
            target(data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
