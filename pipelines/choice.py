"""Which loader reads a set: the one that a recipe names, or the fastest that is there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from pipelines.config import LoaderConfig
from pipelines.jpeg.decoder import jpeg_decoder, why_no_jpeg_decoder
from pipelines.loading import Loader, StreamedLoader
from pipelines.packed.images import BetonImages
from pipelines.resident import ResidentLoader, as_stored, free_bytes, resident_bytes
from pipelines.sources import ArrayImages, Source
from pipelines.views import View

# Imported when they are chosen: none needs the libraries of the others.
_LOADERS = {
    "dali": ("pipelines.dali", "DaliLoader"),
    "ffcv": ("pipelines.ffcv", "FFCVLoader"),
    "native": ("pipelines.native", "NativeLoader"),
    "plain": ("pipelines.plain", "PlainLoader"),
}
_DECODED_AT_START = 4 * 10**9  # bytes of pixels: more would keep a run waiting for its first step


def build_loader(name: str, source: Source, plan: tuple[View, ...], *, config: LoaderConfig, **settings: Any) -> Loader:
    """The loader of a training run, by the name that `choose` gave; `settings` as `StreamedLoader` takes them.

    Raises:
        DataError: it is not installed, or cannot read this set.
    """
    if name == "resident":
        return ResidentLoader(source, plan, config=config, **settings)
    return _make(name, source, plan, config, settings)


def streamed_loader(source: Source, plan: tuple[View, ...], *, config: LoaderConfig, **settings: Any) -> StreamedLoader:
    """The same for a single pass, which holding the set on the device would not serve.

    Its pixels are those of a whole decode: an evaluation should not depend on what loads its images.
    """
    changes: dict[str, Any] = {"reader": "ours", "scaled": False}
    other_storage = config.loader == "ffcv" and not isinstance(source.images, BetonImages)
    if config.loader == "resident" or other_storage:  # a run's own settings, for a set that it was not trained on
        changes["loader"] = "auto"
    once = config.model_copy(update=changes)
    name, _ = choose(source, once, None, settings["device"])
    return _make(name, source, plan, once, settings)


def choose(source: Source, config: LoaderConfig, size: int | None, device: torch.device) -> tuple[str, str]:
    """(name, reason) of a loader; `size` None: not the resident one."""
    if config.loader != "auto":
        return config.loader, "as the recipe says"
    if config.reader == "dali":
        return "dali", "data.reader=dali"
    if size is not None and as_stored(source, size):
        needed, free = resident_bytes(source, size), free_bytes(device)
        at_once = isinstance(source.images, ArrayImages) or needed <= _DECODED_AT_START
        if at_once and needed <= 0.3 * free:
            return "resident", f"the images take {needed / 1e9:.2g} GB of the {free / 1e9:.0f} GB free on {device}"
    if isinstance(source.images, BetonImages):
        if jpeg_decoder() is not None:
            return "ffcv", "the images are in a .beton"
        if _installed("ffcv"):
            return "ffcv", f"the images are in a .beton; FFCV's decoder in place of ours, since {why_no_jpeg_decoder()}"
    if device.type == "cuda" and _installed("nvidia.dali"):
        return "dali", "it decodes on the GPU"
    if jpeg_decoder() is not None:
        return "native", "our decoder, images decoded as they are needed"
    if _installed("nvidia.dali"):
        return "dali", f"{why_no_jpeg_decoder()}, so our decoder cannot be built"
    return "plain", f"torchvision, two to three times slower: {why_no_jpeg_decoder()}, and NVIDIA DALI is not installed"


def steady_pixels(name: str, source: Source, config: LoaderConfig) -> bool:
    """Whether a view that is not augmented has the same pixels in every epoch.

    Not so where JPEGs are decoded at a reduced size: how far depends on the other crops of the image as well.
    """
    return name == "resident" or not config.scaled or isinstance(source.images, ArrayImages)


def _make(
    name: str, source: Source, plan: tuple[View, ...], config: LoaderConfig, settings: dict[str, Any]
) -> StreamedLoader:
    module, kind = _LOADERS[name]
    loader: type[StreamedLoader] = getattr(importlib.import_module(module), kind)
    return loader(source, plan, config=config, **settings)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent
        return False
