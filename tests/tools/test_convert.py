"""`python -m tools.convert`: odd and broken files, stops and resumes, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.jpeg.decoder import jpeg_decoder
from pipelines.packed import conversion, encode, finishing, worker
from pipelines.packed.gathering import gather
from pipelines.packed.pool import Channel
from pipelines.sources import DataConfig, open_source
from tests.pipelines.packing import photo, run
from tests.pipelines.stored_sets import noise


def opened(root: Path) -> Any:
    return open_source(DataConfig(source="folder", root=root, holdout=0.0), "train").images


# ---- odd files ------------------------------------------------------------------------------------------


def odd_files(folder: Path) -> None:
    """Files that are images, if not as one expects."""
    folder.mkdir(parents=True)
    picture = photo(40, 50)
    picture.convert("L").save(folder / "gray.jpg")
    picture.save(folder / "progressive.jpg", progressive=True)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.save(folder / "really_png.png")
    (folder / "really_png.png").rename(folder / "really_png.jpg")
    Image.fromarray(noise(40, 50).astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    photo(600, 300).save(folder / "large.jpg")


def bad_files(folder: Path) -> dict[str, str]:
    """Files that are no images any more -> the reason that is given."""
    folder.mkdir(parents=True)
    file = io.BytesIO()
    photo(200, 200).save(file, format="JPEG", quality=95)
    whole = file.getvalue()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "garbage.jpg").write_bytes(noise(3_000).tobytes())
    Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    reasons = {
        "truncated.jpg": r"[Tt]runcated|[Pp]remature end",
        "empty.jpg": "the file is empty",
        "garbage.jpg": "not an image that Pillow knows",
        "bomb.png": r"12,000 x 12,000 are more than 89,478,485 pixels",
        "dangling.jpg": "No such file",
    }
    if jpeg_decoder() is not None:  # Pillow shows gray for what is missing here
        scan = whole.index(b"\xff\xda") + 14
        middle = (scan + len(whole)) // 2
        (folder / "corrupt.jpg").write_bytes(whole[:middle] + b"\xff\xd9" + whole[middle + 2 :])
        reasons["corrupt.jpg"] = r"[Cc]orrupt|[Pp]remature"
    return reasons


def test_odd_files_become_what_pillow_shows(tmp_path: Path) -> None:
    odd_files(tmp_path / "tree" / "odd")
    assert run(tmp_path / "tree", tmp_path / "raw", "--to", "ffcv", "--write-mode", "raw").exit_code == 0
    assert run(tmp_path / "tree", tmp_path / "jpg", "--to", "ffcv").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "tree" / "odd").iterdir())
    kept = []
    for row, name in enumerate(names):
        path = tmp_path / "tree" / "odd" / name
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            if name == "sixteen.png":
                expected = np.repeat((np.asarray(image) // 257).astype(np.uint8)[..., None], 3, axis=2)
            elif name == "large.jpg":
                expected = np.asarray(image.resize((250, 500), Image.Resampling.BICUBIC))
        assert np.array_equal(opened(tmp_path / "raw")[row], expected), name
        stored = bytes(opened(tmp_path / "jpg").read(row))
        assert opened(tmp_path / "jpg")[row].shape == expected.shape
        with Image.open(io.BytesIO(stored)) as image:
            assert (image.format, image.getexif().get(0x0112, 1)) == ("JPEG", 1)
        if stored == path.read_bytes():
            kept.append(name)
    assert kept == ["gray.jpg", "progressive.jpg"]
    assert run(tmp_path / "jpg", "--verify").exit_code == 0


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("to", ["ffcv", "webdataset", "tfrecord"])
def test_bad_files_are_left_out_and_named(to: str, skip: bool, tree: Path, tmp_path: Path) -> None:
    reasons = bad_files(tree / "c")
    photo(20, 20).save(tree / "c" / "good.jpg")
    (tree / "c" / "notes.txt").write_text("not an image")
    (tree / "c" / ".hidden.jpg").write_bytes(b"")
    (tree / "loose.jpg").write_bytes((tree / "c" / "good.jpg").read_bytes())
    result = run(tree, tmp_path / "packed", "--to", to, *(["--skip-bad"] if skip else []))
    assert result.exit_code == (0 if skip else 1), result.output
    assert f"{len(reasons)} images could not be converted" in result.output
    lines = [json.loads(line) for line in (tmp_path / "packed" / "skipped.jsonl").read_text().splitlines()]
    told = {Path(line["file"]).name: line for line in lines}
    assert len(told) == len(lines) == len(reasons) + 3
    for name, reason in reasons.items():
        assert told[name]["file"] == str(tree / "c" / name)
        assert re.search(reason, told[name]["reason"]), told[name]
        assert told[name]["part"] == "train"
    listed = sorted(path.name for path in (tree / "c").iterdir() if path.suffix != ".txt" and path.name[0] != ".")
    assert {name: told[name]["index"] - 9 for name in reasons} == {name: listed.index(name) for name in reasons}
    assert told["notes.txt"]["reason"] == "not an image by its name"
    assert told[".hidden.jpg"]["reason"] == "hidden"
    assert told["loose.jpg"]["reason"] == "outside of the class folders"
    images = opened(tmp_path / "packed")
    assert len(images) == 10
    assert images[9].shape == (20, 20, 3)
    assert run(tmp_path / "packed", "--verify").exit_code == 0


def test_without_our_decoder_pillow_decides(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_jpeg_decoder", lambda: None)
    data = (tree / "a" / "0.jpg").read_bytes()
    (tree / "a" / "0.jpg").write_bytes(data[: len(data) // 2])
    assert run(tree, tmp_path / "packed", "--to", "ffcv").exit_code == 1
    assert "image file is truncated" in (tmp_path / "packed" / "skipped.jsonl").read_text()
    assert len(opened(tmp_path / "packed")) == 8


def test_nothing_good_is_an_error(tmp_path: Path) -> None:
    bad_files(tmp_path / "tree" / "c")
    result = run(tmp_path / "tree", tmp_path / "packed", "--to", "ffcv")
    assert result.exit_code == 2
    assert "train images can be packed; the first: " in result.output
    assert not (tmp_path / "packed" / "manifest.json").exists()


# ---- stops and resumes ----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines.packed.conversion import convert
from pipelines.packed.encode import Options
from pipelines.packed.gathering import gather
from pipelines.sources import DataConfig
done = 0
def progress(images):
    global done
    done += images
    if done >= 250:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    source, _ = gather(DataConfig(source="folder", root=sys.argv[1]), None)
    convert(source, Path(sys.argv[2]), Options(to=sys.argv[3], shard_mb=1), workers=2, progress=progress)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    (folder / "a").mkdir()
    for place in range(300):
        Image.fromarray(noise(64, 64, 3, seed=place)).save(folder / "a" / f"{place:03d}.jpg", quality=95)
    return folder


@pytest.mark.parametrize("to", ["ffcv", "webdataset"])
def test_a_killed_conversion_goes_on(to: str, many: Path, tmp_path: Path) -> None:
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    killed = subprocess.run([sys.executable, "-c", KILLED, many, stopped, to], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {path.suffix for path in stopped.iterdir()} <= {".partial", ""}
    done = len((stopped / ".conversion" / "journal.jsonl").read_text().splitlines())
    assert done >= 1
    assert "not finished" in run(stopped, "--verify").output

    other = run(many, stopped, "--to", to, "--shard-mb", 1, "--quality", 80)
    assert other.exit_code == 2
    assert "an unfinished conversion of another kind (quality: 90 there, 80 now)" in other.output

    again = run(many, stopped, "--to", to, "--shard-mb", 1)
    assert again.exit_code == 0, again.output
    assert "written earlier" in again.output
    assert run(many, undisturbed, "--to", to, "--shard-mb", 1).exit_code == 0
    ours, theirs = opened(stopped), opened(undisturbed)
    for name in ("index", "label", "height", "width", "shard", "length", "raw"):
        assert np.array_equal(getattr(ours.table, name), getattr(theirs.table, name))
    assert all(bytes(ours.read(row)) == bytes(theirs.read(row)) for row in range(300))
    names = sorted(path.name for path in undisturbed.iterdir())
    assert sorted(path.name for path in stopped.iterdir()) == names
    for name in names:
        if to != "ffcv":  # a .beton's chunks lie in the order in which they came
            assert (stopped / name).read_bytes() == (undisturbed / name).read_bytes()
    assert run(stopped, "--verify").exit_code == 0
    assert "already done" in run(many, stopped, "--to", to, "--shard-mb", 1).output
    refused = run(many, stopped, "--to", to, "--shard-mb", 1, "--max-side", 32)
    assert refused.exit_code == 2
    assert "a finished conversion of another kind (max_side: 500 there, 32 now)" in refused.output


@pytest.mark.parametrize("stage", ["index", "names", "manifest"])
@pytest.mark.parametrize("to", ["ffcv", "tfrecord"])
def test_a_stop_at_the_end_leaves_nothing_that_looks_finished(
    stage: str, to: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    write_file = finishing.write_file
    with monkeypatch.context() as patched:
        if stage == "manifest":
            patched.setattr(
                finishing, "write_file", lambda path, data: stop() if "manifest" in path else write_file(path, data)
            )
        elif stage == "names":
            patched.setattr(finishing, "_sync_folder", stop)
        else:
            patched.setattr(finishing, "finish" if to == "ffcv" else "write_index", stop)
        result = run(tree, tmp_path / "packed", "--to", to)
    assert result.exit_code == 130
    assert "the same command continues" in result.output
    assert not (tmp_path / "packed" / "manifest.json").exists()
    assert (tmp_path / "packed" / ".conversion" / "plan.json").exists()
    assert run(tree, tmp_path / "packed", "--to", to).exit_code == 0
    assert run(tree, tmp_path / "fresh", "--to", to).exit_code == 0
    for path in (tmp_path / "fresh").iterdir():
        assert path.read_bytes() == (tmp_path / "packed" / path.name).read_bytes()
    assert len(list((tmp_path / "packed").iterdir())) == len(list((tmp_path / "fresh").iterdir()))


def test_lost_files_are_written_again(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for to in ("ffcv", "webdataset"):
        with monkeypatch.context() as patched:
            patched.setattr(conversion, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            assert run(tree, tmp_path / to, "--to", to).exit_code == 130
        next((tmp_path / to).glob("train*.partial")).unlink()
        assert run(tree, tmp_path / to, "--to", to, "--verify").exit_code == 0


def test_a_source_that_changed_is_not_resumed(tree: Path, packed: Path) -> None:
    path = tree / "a" / "0.jpg"
    facts = path.stat()
    path.write_bytes(path.read_bytes()[::-1])  # of the same size
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    result = run(tree, packed, "--to", "ffcv")
    assert result.exit_code == 2
    message = "(the source's files or labels are not those of then; a file's new date counts as a change)"
    assert message in result.output
    photo(10, 10, 99).save(tree / "a" / "more.jpg")
    result = run(tree, packed, "--to", "ffcv")
    assert result.exit_code == 2
    assert "the source's files or labels are not those of then" in result.output
    assert "train: 9 there, 10 now" in result.output


def test_a_full_disk_is_said_in_one_line(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for to, where, name in (
        ("ffcv", (os, "pwrite"), "train.beton.partial"),
        ("webdataset", (os, "fsync"), "packed"),
        ("tfrecord", (worker.ShardWriter, "_write"), "train-00000.tfrecord.partial"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(*where, full)
            result = run(tree, tmp_path / to / "packed", "--to", to)
        assert result.exit_code == 2
        (line,) = result.output.splitlines()[-1:]
        assert re.search(rf"error: cannot write .*{name}.*: No space left on device; .*the same command contin", line)
        assert "Traceback" not in result.output
        assert run(tree, tmp_path / to / "packed", "--to", to, "--verify").exit_code == 0


def test_other_files_in_an_unfinished_folder_are_left_alone(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(tree, packed, "--to", "webdataset").exit_code == 130
    mine = {"notes.tmp", "mine.tar", "letter.partial", "train-1.npz", "manifest.tmp"}
    for name in mine:
        (packed / name).write_text(name)
    (packed / "manifest.json.123.tmp").write_text("a draft of a process that was killed")
    (packed / "train-00007.tar.partial.123.tmp").write_text("another one")
    assert run(tree, packed, "--to", "webdataset").exit_code == 0
    ours = {"manifest.json", "skipped.jsonl", "train-00000.tar", "train-00000.idx", "train.index.npz"}
    assert {path.name for path in packed.iterdir()} == mine | ours
    assert all((packed / name).read_text() == name for name in mine)


def test_a_folder_is_taken_for_unfinished_by_its_plan_alone(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "packed" / ".conversion").mkdir(parents=True)
    (tmp_path / "packed" / "train.beton").write_text("mine")
    result = run(tree, tmp_path / "packed", "--to", "ffcv")
    assert result.exit_code == 2
    assert "is not empty (train.beton)" in result.output
    assert (tmp_path / "packed" / "train.beton").read_text() == "mine"


def test_a_late_worker_touches_nothing(tree: Path, tmp_path: Path) -> None:
    """Its parent was killed, another one finished the chunk; then the worker gets its turn."""

    def gone(kind: str, value: Any) -> Any:
        raise BrokenPipeError

    source, _ = gather(DataConfig(source="folder", root=tree), None)
    (part,) = source.parts
    finished = tmp_path / "train-00000.tar.partial"
    finished.write_text("finished")
    lock = str(tmp_path / "lock")
    options = encode.Options(to="webdataset")
    chunk = worker.Chunk(str(tmp_path), lock, "train", 0, part.images, part.index, part.label, options)
    with pytest.raises(BrokenPipeError):
        worker.pack_chunk(chunk, Channel(gone))
    assert finished.read_text() == "finished"


def test_what_has_no_effect_is_no_difference(tree: Path, tmp_path: Path) -> None:
    for to in ("ffcv", "webdataset"):
        command = tree, tmp_path / to, "--to", to, "--write-mode", "raw"
        assert run(*command).exit_code == 0
        assert "already done" in run(*command, "--quality", 50, "--jpeg", "encode").output
