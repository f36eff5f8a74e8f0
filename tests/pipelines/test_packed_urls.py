"""A packed set behind a URL, and what is said where its server fails."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.packed import files
from pipelines.sources import DataConfig, DataError, open_source
from tests.pipelines.packing import FORMATS, as_packed, assert_alike, pack, photo_tree


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's file server, and ranges; or with a fault."""

    asked: list[str] = []  # noqa: RUF012
    fault: str | None = None
    requests = 0

    def do_HEAD(self) -> None:
        if not self._faulty():
            super().do_HEAD()

    def do_GET(self) -> None:
        if not self._faulty():
            self._send()

    def _faulty(self) -> bool:
        """Whether the answer is given."""
        kind = type(self)
        kind.requests += 1
        if kind.fault == "silent":
            time.sleep(3)
        elif kind.fault == "breaks" and kind.requests % 8 in (3, 4):  # twice: aiohttp tries once more itself
            self.close_connection = True
            return True
        elif (kind.fault == "busy" and kind.requests % 3 == 0) or (kind.fault or "").isdigit():
            self.send_error(503 if kind.fault == "busy" else int(kind.fault or 0))
            return True
        elif kind.fault == "no index" and self.path.endswith(".npz"):
            self.send_error(403)
            return True
        elif kind.fault == "no ranges":
            del self.headers["Range"]
        elif kind.fault == "no lengths" and self.path.endswith("json"):
            self.send_response(200)
            http.server.SimpleHTTPRequestHandler.end_headers(self)
            return True
        return False

    def _send(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        self.asked.append(path.name)
        first, last = int(wanted[1]), min(int(wanted[2]), path.stat().st_size - 1)
        with path.open("rb") as file:
            file.seek(first)
            data = file.read(last - first + 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(Ranges, directory=str(tmp_path))
    Ranges.fault, Ranges.requests = None, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("to", FORMATS)
def test_behind_a_url(to: str, tmp_path: Path, server: str) -> None:
    pytest.importorskip("aiohttp")
    import fsspec

    config = photo_tree(tmp_path / "tree", {"a": 5, "b": 4})
    pack(config, tmp_path / "packed", to=to)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "packed"), f"/{tmp_path.name}", recursive=True)
    urls = (
        f"memory://{tmp_path.name}",
        f"file://{tmp_path}/packed",
        f"{server}/packed",
        f"simplecache::{server}/packed/",
    )
    Ranges.asked.clear()
    for url in urls:
        assert_alike(config, DataConfig(source="folder", url=url, holdout=0.0))
    assert sum(name.startswith("train") for name in Ranges.asked) >= 4  # images came by ranges
    pack(DataConfig(source="folder", url=urls[2], holdout=0.0), tmp_path / "again", to="ffcv")
    assert_alike(config, as_packed(config, tmp_path / "again"))


def test_what_is_wrong_with_a_url_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.url .* and data\.root .* two places"):
        DataConfig(source="folder", url="memory://x", root=tmp_path)
    with pytest.raises(ValueError, match=r"expected protocol://"):
        DataConfig(source="folder", url="/some/folder")
    with pytest.raises(DataError, match=r"no manifest\.json of a packed set"):
        open_source(DataConfig(source="folder", url="memory://nothing"), "train")
    with pytest.raises(DataError, match=r"cannot (read|open) nosuch://x"):
        open_source(DataConfig(source="folder", url="nosuch://x"), "train")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(DataError, match=r"gcsfs"):
            open_source(DataConfig(source="folder", url="gs://bucket/x"), "train")


@pytest.mark.parametrize("to", ["ffcv", "webdataset"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", r"cannot read .*manifest\.json: ClientResponseError: 503"),
        ("403", r"cannot read .*manifest\.json: ClientResponseError: 403"),
        ("404", r"no manifest\.json of a packed set"),
        ("no ranges", r"manifest\.json: the server sends [\d,]+ bytes where 1 are asked for: it does not know ranges"),
        ("no lengths", r"does not tell its size \(no Content-Length\)"),
        ("silent", r"cannot read .*manifest\.json: .*[Tt]imeout"),
        ("no index", r"cannot read .*index\.npz: ClientResponseError: 403"),
        ("busy", None),
        ("breaks", None),
    ],
)
def test_what_is_wrong_with_a_server_is_said(
    to: str, fault: str, message: str | None, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that fails now and then is asked again."""
    pytest.importorskip("aiohttp")
    if to == "ffcv" and fault == "no index":
        pytest.skip("a .beton has no index beside it")
    monkeypatch.setattr(files, "_PAUSES", (0.01, 0.01))
    monkeypatch.setattr(files, "_PATIENCE", 0.2 if fault == "silent" else 20.0)
    config = photo_tree(tmp_path / "tree", {"a": 5, "b": 4})
    pack(config, tmp_path / "packed", to=to)
    Ranges.fault = fault
    remote = DataConfig(source="folder", url=f"{server}/packed", holdout=0.0)
    if message is None:
        assert_alike(config, remote)
        return
    with pytest.raises(DataError, match=message):
        open_source(remote, "train")
