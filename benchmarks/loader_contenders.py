"""Who loads images in `benchmarks/loaders.py`: each a function that goes once over a store and counts the images.

Every contender lives in a process of its own, since these libraries set threads and allocators for a whole process. It
makes a pass whenever a line comes in, and answers with the seconds and the CPU-seconds that it took, workers included.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
import torch

from pipelines.config import LoaderConfig
from pipelines.sources import DataConfig, Source, open_source
from pipelines.views import ViewsConfig

SIZE, BATCH = 224, 50
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pass = Callable[[], int]  # one pass over the store; the number of images


def source(store: Path) -> Source:
    return open_source(DataConfig(source="folder", root=store, holdout=0), "pretrain")


# ---- ours -------------------------------------------------------------------------------------------------


def ours(store: Path, workers: int, *, loader: str, whole: bool) -> Pass:
    """`whole`: normalised float32 views; else the uint8 crops."""
    from pipelines.choice import build_loader

    torch.set_num_threads(workers)
    config = LoaderConfig.model_validate({"loader": loader, "workers": workers, "last": "pad"})
    settings: dict[str, Any] = {"size": SIZE, "batch_size": BATCH, "seed": 0, "device": torch.device("cpu")}
    made: Any = build_loader(loader, source(store), ViewsConfig(plan="simclr").resolve(), config=config, **settings)
    epochs = iter(range(10**6))

    def crops() -> int:
        epoch = next(epochs)
        return sum(len(batch.indices) for batch in made.crops(epoch, made.order.shares(epoch)))

    def views() -> int:
        return sum(len(batch.indices) for batch in chain(*made.epoch(next(epochs))))

    return views if whole else crops


# ---- torchvision ------------------------------------------------------------------------------------------


class TorchvisionViews(torch.utils.data.Dataset[torch.Tensor]):
    """A file -> two views by transforms v2: decoded once, the crops on uint8, as its documentation advises."""

    def __init__(self, paths: list[str], whole: bool) -> None:
        from torchvision.transforms import v2

        self.paths = paths
        crop: list[Any] = [v2.RandomResizedCrop(SIZE, (0.08, 1.0), antialias=True)]
        colour: list[Any] = [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
        self.transform = v2.Compose(crop + colour if whole else crop)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = torchvision_decode(Path(self.paths[index]).read_bytes())
        return torch.stack([self.transform(image), self.transform(image)])


def torchvision_decode(data: bytes) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def torchvision(store: Path, workers: int, *, whole: bool) -> Pass:
    images = TorchvisionViews([str(path) for path in sorted(store.rglob("*.JPEG"))], whole)
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, multiprocessing_context="forkserver"
    )
    return lambda: sum(map(len, loader))


# ---- DALI -------------------------------------------------------------------------------------------------


def dali(store: Path, workers: int, *, whole: bool) -> Pass:
    """DALI's own reader, one decode, two random crops; `whole`: all of SimCLR's augmentation as well."""
    library: Any = importlib.import_module("nvidia.dali")  # its stubs know less than it does
    fn, types, pipeline_def = library.fn, library.types, library.pipeline_def
    paths = [str(path) for path in sorted(store.rglob("*.JPEG"))]

    def colours(image: Any) -> Any:
        if fn.random.coin_flip(probability=0.8, dtype=types.BOOL):
            factor = {"range": (0.2, 1.8)}
            image = fn.color_twist(
                image,
                brightness=fn.random.uniform(**factor),
                contrast=fn.random.uniform(**factor),
                saturation=fn.random.uniform(**factor),
                hue=fn.random.uniform(range=(-72, 72)),
            )
        if fn.random.coin_flip(probability=0.2, dtype=types.BOOL):
            image = fn.saturation(image, saturation=0)
        if fn.random.coin_flip(probability=0.5, dtype=types.BOOL):
            image = fn.gaussian_blur(image, sigma=fn.random.uniform(range=(0.1, 2.0)), window_size=23)
        return fn.crop_mirror_normalize(
            image,
            mirror=fn.random.coin_flip(),
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
            output_layout="CHW",
        )

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None, seed=0, enable_conditionals=True)
    def pipeline() -> Any:
        data, _ = fn.readers.file(files=paths, shuffle_after_epoch=True, pad_last_batch=True)
        image = fn.decoders.image(data, device="cpu")
        views = [fn.random_resized_crop(image, size=SIZE, random_area=(0.08, 1.0)) for _ in range(2)]
        return tuple(colours(view) for view in views) if whole else tuple(views)

    built = pipeline()
    built.build()

    def run() -> int:
        for _ in range(-(-len(paths) // BATCH)):
            built.run()
        return len(paths)

    return run


# ---- FFCV -------------------------------------------------------------------------------------------------


def ffcv(store: Path, workers: int) -> Pass:
    """FFCV's own Loader with one decoding pipeline a view, as FFCV-SSL makes several views."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    decoders = [RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=(0.08, 1.0)) for _ in range(2)]
    loader = Loader(
        str(store / "train.beton"),
        batch_size=BATCH,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={
            "image": PipelineSpec("image", decoder=decoders[0], transforms=[]),
            "image_2": PipelineSpec("image", decoder=decoders[1], transforms=[]),
            "label": None,
            "index": None,
        },
    )
    return lambda: sum(len(batch[0]) for batch in loader)


# ---- the bound --------------------------------------------------------------------------------------------


def decoding(store: Path, workers: int, *, decode: str) -> Pass:
    """Nothing but whole decodes of JPEGs that are in memory, on as many threads as the loaders have."""
    images = source(store).images
    stored = [np.array(np.frombuffer(images.read(index), np.uint8)) for index in range(len(images))]
    one = {"ours": _decode_ours, "torchvision": _decode_torchvision, "ffcv": _decode_ffcv}[decode]()
    pool = ThreadPoolExecutor(workers)
    sizes = np.asarray(images.sizes).tolist()
    pairs = list(zip(stored, sizes, strict=True))

    def some(first: int) -> int:
        for data, size in pairs[first::workers]:
            one(data, size)
        return len(pairs[first::workers])

    return lambda: sum(pool.map(some, range(workers)))


def _decode_ours() -> Callable[[np.ndarray, list[int]], object]:
    from pipelines.jpeg.decoder import jpeg_decoder

    decoder = jpeg_decoder()
    assert decoder is not None
    return lambda data, size: decoder.decode(data)


def _decode_torchvision() -> Callable[[np.ndarray, list[int]], object]:
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda data, size: decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)


def _decode_ffcv() -> Callable[[np.ndarray, list[int]], object]:
    from ffcv.libffcv import ctypes_imdecode

    own = threading.local()

    def fast(data: np.ndarray, size: list[int]) -> int:  # FFCV asks for the fast DCT
        if not hasattr(own, "target"):
            own.target = np.empty(3 * 4096**2, np.uint8)
        height, width = size
        place = data.ctypes.data, data.size, height, width, own.target.ctypes.data, height, width
        return ctypes_imdecode(*place, 0, 0, 1, 1, False, False)

    return fast


MAKERS: dict[str, Callable[..., Pass]] = {
    "ours": ours,
    "torchvision": torchvision,
    "dali": dali,
    "ffcv": ffcv,
    "decoding": decoding,
}


def cpu_seconds() -> float:
    """Of this process, of those below it (in hundredths, as Linux counts) and of those that have ended."""
    process = psutil.Process()
    ended = sum(process.cpu_times()[2:4])
    return time.process_time() + ended + sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))


def main() -> None:
    """Arguments: maker, store, workers, further arguments as JSON. Each line of stdin: one pass."""
    maker, store, workers, further = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    run = MAKERS[maker](Path(store), int(workers), **json.loads(further))
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), cpu_seconds()
        images = run()
        answer = {"images": images, "wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
