"""Image files of strangers: decoded, or a DataError within bounds of time and memory, in every loader."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.choice import build_loader
from pipelines.config import LoaderConfig
from pipelines.jpeg.decoder import JpegDecoder, JpegError, jpeg_decoder, why_no_jpeg_decoder
from pipelines.packed.encode import BadImage, decode_checked
from pipelines.sources import DataConfig, DataError, describe, open_source
from pipelines.stored.encoded import FORMATS, MOST_PIXELS
from pipelines.stored.images import EXTENSIONS, FileImages, decode, decode_bytes, stored_size, upright_jpeg
from pipelines.views import View
from tests.fuzz.test_bad_packed import readable
from tests.fuzz.trials import trials, try_mutations, with_memory
from tests.pipelines.jpeg.jpeg_files import encode, kinds, photo
from tests.pipelines.jpeg.test_damage import cmyk
from tests.pipelines.packing import run

ROOT = Path(__file__).parents[2]


def pictures() -> dict[str, bytes]:
    """A small image in every kind that is opened."""
    pixels = np.ascontiguousarray(photo()[150:190, 200:248])
    found = {f"{kind}.jpg": data for kind, data in kinds(40, 48).items()} | {"cmyk.jpg": cmyk()}
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
        image = Image.fromarray(pixels)
        image = (
            Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)) if mode == "I;16" else image.convert(mode)
        )
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found[f"{mode}.png"] = buffer.getvalue()
    for ending in ("ppm", "bmp", "webp", "gif"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, ending)
        found[f"x.{ending}"] = buffer.getvalue()
    for compression in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF", compression=compression)
        found[f"{compression}.tif"] = buffer.getvalue()
    return found


@trials(quick=600, many=60_000)
def test_a_mutated_image_is_decoded_or_refused(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"

    def check(data: bytes) -> np.ndarray | None:
        path.write_bytes(data)
        upright_jpeg(data)
        try:
            size = stored_size(path)
            pixels = decode(path)
        except DataError as error:
            readable(error)
            return None
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*size, 3)
        try:  # as tools.convert does
            decode_checked(data)
        except BadImage as error:
            readable(error)
        return pixels

    assert try_mutations(check, list(pictures().values()), count) > count // 50


@pytest.fixture(scope="module")
def decoder() -> JpegDecoder:
    found = jpeg_decoder()
    if found is None:
        pytest.skip(f"the JPEG decoder cannot be built: {why_no_jpeg_decoder()}")
    return found


@trials(quick=1_500, many=300_000)
def test_our_decoder_survives_mutated_jpegs(count: int, decoder: JpegDecoder) -> None:
    """Without sanitisers, by way of Python; see also the test below."""

    def check(data: bytes) -> np.ndarray | None:
        try:
            header = decoder.header(data)
            if header.height * header.width > 1 << 20:
                return None
            out = np.empty((1, 1, 16, 16, 3), np.uint8)
            box = np.array([[[0, 0, header.height, header.width]]])
            decoder.decode_crops([data], box, out, sizes=np.array([(header.height, header.width)]))
            return decoder.decode(data)
        except JpegError as error:
            readable(error)
            return None

    assert try_mutations(check, list(kinds(48, 56).values()), count) > count // 10


@trials(quick=3_000, many=400_000)
def test_no_byte_is_touched_outside_of_its_buffer(count: int, tmp_path: Path) -> None:
    """`decoder_fuzz.c` under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "fuzz"
    source = ROOT / "tests" / "fuzz" / "decoder_fuzz.c"
    built = subprocess.run(
        [compiler, *flags, str(source), "-ljpeg", "-lm", "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode and ("asan" in built.stderr or "ubsan" in built.stderr or "jpeg" in built.stderr):
        pytest.skip(f"no sanitisers or no libjpeg here: {built.stderr.splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    files = []
    for name, data in {**pictures(), **kinds(16, 16)}.items():
        if data[:2] == b"\xff\xd8":
            files.append(tmp_path / f"{len(files)}.jpg")
            files[-1].write_bytes(data)
        del name
    done = subprocess.run(
        [str(program), "0", str(count), *map(str, files)], capture_output=True, text=True, check=False, timeout=560
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    assert f"{count} trials" in done.stdout


# ---- bombs ---------------------------------------------------------------------------------------------


def png_bomb(side: int) -> bytes:
    """A kilobyte or so that promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_bomb(side: int) -> bytes:
    data = bytearray(encode(photo()[:16, :16]))
    at = data.index(b"\xff\xc0\x00\x11\x08") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG whose coarsest pass comes again and again."""
    data = kinds(64, 64)["progressive"]
    first = data.index(b"\xff\xda")
    scan = bytearray(data[first : data.index(b"\xff\xc4", first)])
    scan[scan[3] + 1] = 0
    return data[:-2] + bytes(scan) * scans + data[-2:]


def tiff_bomb(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "TIFF", compression="tiff_adobe_deflate")
    data = bytearray(buffer.getvalue())
    for tag in (256, 257):  # width, height: SHORT or LONG, one value
        for kind in (3, 4):
            at = data.find(struct.pack("<HHI", tag, kind, 1))
            if at >= 0:
                data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, side)
    return bytes(data)


REFUSED = r"more than 89,478,485|more pixels than the limit|too many scans"
BOMBS = {
    "50,000 x 50,000 PNG": png_bomb(50_000),
    "just too large PNG": png_bomb(9_460),
    "65,000 x 65,000 JPEG": jpeg_bomb(65_000),
    "just too large JPEG": jpeg_bomb(9_460),
    "50,000 x 50,000 TIFF": tiff_bomb(50_000),
    "2,000 scans": scan_bomb(2_000),
}


def tree(root: Path, bomb: bytes) -> DataConfig:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            (root / name / f"{number}.jpg").write_bytes(encode(photo()[number * 8 : number * 8 + 40, :48]))
    (root / "b" / "9.jpg").write_bytes(bomb)
    return DataConfig(source="folder", root=root, holdout=0.0)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_every_reader(name: str, tmp_path: Path) -> None:
    tree(tmp_path / "photos", BOMBS[name])
    assert len(BOMBS[name]) < 200_000

    def read() -> str:
        """All that reads an image, in one process that may take 700 MB more than now."""
        images = FileImages(tmp_path / "photos" / "b", ["9.jpg"])
        said = []
        for action in (
            lambda: images[0],
            lambda: decode_bytes(images.read(0), "it"),
            lambda: decode_checked(images.read(0)),
            lambda: stored_size(images.path(0)),
            lambda: upright_jpeg(images.read(0)),
        ):
            try:
                said.append(f"gave {type(action()).__name__}")
            except (DataError, BadImage) as error:
                said.append(str(error))
        return "\n".join(said)

    *decoders, size, upright = with_memory(700, read).splitlines()
    assert all("more than 89,478,485" in said or "too many scans" in said for said in decoders), decoders
    assert "more than 89,478,485" in size or "scans" in name
    assert upright == "gave NoneType"
    said = with_memory(700, lambda: run(tmp_path / "photos", tmp_path / "packed", "--to", "webdataset").exit_code)
    assert said == "1"  # packed, but for one
    reasons = (tmp_path / "packed" / "skipped.jsonl").read_text()
    assert reasons.count("\n") == 1
    assert "more than 89,478,485" in reasons or "too many scans" in reasons


@pytest.mark.parametrize("loader", ["native", "resident", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["50,000 x 50,000 PNG", "just too large JPEG", "2,000 scans"])
def test_bombs_are_refused_by_every_loader(loader: str, name: str, tmp_path: Path, decoder: JpegDecoder) -> None:
    source = open_source(tree(tmp_path, encode(photo()[:40, :48])), "train")
    (tmp_path / "b" / "9.jpg").write_bytes(BOMBS[name])  # or it would be found on opening, if there are 500 images

    def read() -> str:
        plan = (View(crop="random_resized"),) * 2
        settings = {"size": 16, "batch_size": 9, "seed": 0, "device": torch.device("cpu")}
        made = build_loader(loader, source, plan, config=LoaderConfig(workers=1, ahead=1), **settings)
        try:
            for _ in made.epoch(0):
                pass
        finally:
            made.close()
        return "done"

    if loader == "plain":  # its decoding is in processes of its own, which take no memory of this one
        with pytest.raises(DataError, match=REFUSED):
            read()
        return
    said = with_memory(1_500, read)
    assert said.startswith("DataError: "), said
    assert "9.jpg" in said
    assert re.search(REFUSED, said), said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
def test_the_largest_image_takes_a_bounded_amount_of_memory(mode: str, tmp_path: Path) -> None:
    side = int(MOST_PIXELS**0.5)
    path = tmp_path / "x.png"
    image = Image.new(mode, (side, side))
    image.save(path, transparency=0) if mode == "P" else image.save(path)
    assert with_memory(2_600, lambda: decode(path).shape) == str((side, side, 3))


def test_only_formats_of_images_are_opened(tmp_path: Path) -> None:
    """By their content: for PostScript Pillow would start Ghostscript."""
    path = tmp_path / "x.png"
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", b"GIMP", b"BLP2"):
        path.write_bytes(data)
        with pytest.raises(DataError, match="not an image that Pillow knows"):
            decode(path)
    assert not {"EPS", "WMF", "PDF", "MIC", "FPX"} & set(FORMATS)


# ---- names and kinds of files --------------------------------------------------------------------------

ODD_NAMES = [
    "a b.jpg",
    "a\nb.jpg",
    "\x1b[2J.jpg",
    "-rf.jpg",
    "$(id).jpg",
    "ü" * 60 + ".jpg",
    "n" * 250 + ".jpg",
    "%s.jpg",
]


@pytest.mark.parametrize("name", [*ODD_NAMES, b"\xff\xfe.jpg"])
def test_files_may_have_any_name(name: str | bytes, tmp_path: Path) -> None:
    name = os.fsdecode(name)
    config = tree(tmp_path / "photos", encode(photo()[:20, :20]))
    place = tmp_path / "photos" / "a" / name
    place.write_bytes(encode(photo()[:24, :24]))
    images = open_source(config, "train").images
    assert sum(images[row].shape == (24, 24, 3) for row in range(len(images))) == 1
    place.write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        [images[row] for row in range(len(images))]
    readable(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "link to itself", "dangling", "empty", "hole"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photos" / "a" / "x.jpg"
    tree(tmp_path / "photos", encode(photo()[:20, :20]))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "hole":
        path.write_bytes(encode(photo()[:20, :20]))
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to({"device": "/dev/zero", "link to itself": path, "dangling": "nowhere"}[kind])

    def read() -> str:
        images = FileImages(tmp_path / "photos" / "a", ["x.jpg"])
        said = []
        for action in (lambda: images[0], lambda: images.read(0), lambda: images.size):
            try:
                action()
                said.append("read")
            except DataError as error:
                readable(error)
                said.append("refused")
        return " ".join(said)

    said = with_memory(300, read, seconds=60)
    assert said == ("refused read refused" if kind == "empty" else "refused refused refused")


def test_a_folder_without_permission_is_one_readable_error(tmp_path: Path) -> None:
    config = tree(tmp_path / "photos", encode(photo()[:20, :20]))
    (tmp_path / "photos").chmod(0)
    try:
        if os.access(tmp_path / "photos", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(DataError):
            describe(config)
    finally:
        (tmp_path / "photos").chmod(0o700)


def test_links_to_folders_of_links_end(tmp_path: Path) -> None:
    last = tmp_path / "end"
    last.mkdir()
    (last / f"x{EXTENSIONS[0]}").write_bytes(encode(photo()[:20, :20]))
    for level in range(30):  # 2^30 ways down
        folder = tmp_path / f"d{level}"
        folder.mkdir()
        for name in "xy":
            (folder / name).symlink_to(last)
        last = folder
    with pytest.raises(DataError, match="links lead to the folder"):
        open_source(DataConfig(source="folder", root=last), "pretrain")


def test_folders_may_lie_deep(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1_200):  # Python's functions may call each other a thousand times
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        file = os.open("x.png", os.O_WRONLY | os.O_CREAT, dir_fd=here)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        os.write(file, buffer.getvalue())
        os.close(file)
    finally:
        os.close(here)
    try:
        assert len(open_source(DataConfig(source="folder", root=tmp_path, holdout=0.0), "pretrain")) == 1
    finally:  # pytest's own functions, which remove the folder, call each other
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)
