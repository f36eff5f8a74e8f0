"""Frozen features: an encoder in eval mode, applied once to a split and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.config import LoaderConfig
from pipelines.plain_views import plain_batches, ten_crop_batches
from pipelines.sources import DataConfig, Source
from trainers.dropout import add_dropout
from trainers.encoders import EncoderConfig, build_encoder
from trainers.state import CheckpointError, find_checkpoint, load_strict

BATCH_SIZE = 256
Statistics = tuple[float, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class FrozenEncoder:
    """An encoder to be evaluated and how its inputs are made. ``module`` None stands for the pixels themselves."""

    label: str  # for tables
    module: nn.Module | None
    image_size: int
    mean: Statistics
    std: Statistics
    identity: str  # changes with the weights
    folder: Path  # where results and cached features go
    config: EncoderConfig | None = None
    data: DataConfig | None = None  # what it was trained on
    step: int | None = None  # of its run, where it is a checkpoint


def load_encoder(path: Path) -> FrozenEncoder:
    """From a run folder (its newest whole checkpoint) or an exported ``encoder.safetensors``.

    Raises:
        CheckpointError: nothing usable is there, or weights and architecture do not fit; never a partial load.
    """
    if path.is_dir():
        return _from_run(path)
    if path.suffix != ".safetensors" or not path.exists():
        raise CheckpointError(f"{path} is neither a run folder nor an existing .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("twinstream")
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if about is None:
        raise CheckpointError(f"{path} does not say which architecture it holds: no 'twinstream' metadata")
    return _assemble(str(path), tensors, about, path.parent / "evaluations", None)


def random_encoder(config: EncoderConfig, source: Source, size: int | None, seed: int) -> FrozenEncoder:
    """An untrained encoder: what the architecture alone is worth."""
    size = size or source.image_size
    torch.manual_seed(seed)
    module = build_encoder(config, size)
    identity = f"random-{config.arch}-{config.stem}-{size}-{seed}"
    folder = Path("runs/evaluations")
    return FrozenEncoder("random encoder", module, size, source.mean, source.std, identity, folder, config)


def raw_pixels(source: Source, size: int | None) -> FrozenEncoder:
    """Normalised pixels as features."""
    size = size or source.image_size
    mean, std = source.mean, source.std
    return FrozenEncoder("raw pixels", None, size, mean, std, f"pixels-{size}", Path("runs/evaluations"))


def features_of(
    encoder: FrozenEncoder,
    source: Source,
    device: torch.device,
    loading: LoaderConfig | None = None,
    *,
    ten_crop: bool = False,
) -> Tensor:
    """Features [N, d] float32 of a source in its order, from the cache if weights and data are those of last time.

    With ``ten_crop`` [crops, N, d], of the crops that `ten_crop_batches` makes.
    """
    if encoder.module is None:  # pixels are cheaper to read than to keep
        return extract(encoder, source, device, loading, ten_crop=ten_crop)
    key = hashlib.sha256(
        json.dumps(
            [
                encoder.identity,
                encoder.image_size,
                *encoder.mean,
                *encoder.std,
                source.fingerprint(),
                device.type,
                *(["ten_crop"] if ten_crop else []),
            ]
        ).encode()
    ).hexdigest()[:16]
    path = encoder.folder / "features" / f"{key}.safetensors"
    if path.exists():
        try:
            cached = load_file(path)["features"]
        except Exception as error:  # a damaged cache costs a recomputation, nothing else
            print(f"{path} cannot be read ({error}); extracting again")
        else:
            if cached.shape[-2] == len(source.labels):
                return cached.to(device)
    features = extract(encoder, source, device, loading, ten_crop=ten_crop)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    save_file({"features": features.cpu().contiguous()}, draft)
    draft.replace(path)
    return features


@torch.no_grad()
def extract(
    encoder: FrozenEncoder,
    source: Source,
    device: torch.device,
    loading: LoaderConfig | None = None,
    *,
    ten_crop: bool = False,
) -> Tensor:
    """Features [N, d] float32, or [crops, N, d]. The encoder is in eval mode, and comes out as it went in."""
    source = replace(source, mean=encoder.mean, std=encoder.std)  # as the encoder was trained
    with frozen(encoder, device) as module:
        if ten_crop:
            crops = ten_crop_batches(source, encoder.image_size, BATCH_SIZE, device, loading)
            return torch.cat([torch.stack([module(images) for images in views]) for views, _ in crops], dim=1)
        batches = plain_batches(source, encoder.image_size, BATCH_SIZE, device, loading)
        return torch.cat([module(images) for images, _ in batches])


@contextmanager
def frozen(encoder: FrozenEncoder, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """images [N, 3, H, W] -> features [N, d] float32, in eval mode and without gradient; afterwards it is asserted
    that no buffer of the encoder was touched."""
    if encoder.module is None:
        yield lambda images: images.flatten(1)
        return
    module = encoder.module.to(device).to(memory_format=torch.channels_last).eval()
    module.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield lambda images: module(images).float()
    changed = [name for name, buffer in module.named_buffers() if not torch.equal(buffer, before[name])]
    assert not changed, f"evaluation changed the frozen encoder: {changed}"


def _from_run(run: Path) -> FrozenEncoder:
    recipe_path = run / "recipe.yaml"
    if not recipe_path.exists():
        raise CheckpointError(f"{run} is not a run folder: it has no recipe.yaml")
    try:
        data = DataConfig(**yaml.safe_load(recipe_path.read_text())["data"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{recipe_path} is damaged: {error}") from error
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no whole checkpoint yet")
    tensors = {
        name.removeprefix("encoder."): value
        for name, value in load_file(checkpoint / "method.safetensors").items()
        if name.startswith("encoder.")
    }
    state = json.loads((checkpoint / "state.json").read_text())
    label = f"{run.name} ({checkpoint.name})"
    encoder = _assemble(label, tensors, json.dumps(state["encoder"]), run / "evaluations", data)
    return replace(encoder, step=state["step"])


def _assemble(
    label: str, tensors: dict[str, Tensor], metadata: str, folder: Path, data: DataConfig | None
) -> FrozenEncoder:
    try:
        about = json.loads(metadata)
        size = int(about["image_size"])
        config = EncoderConfig(arch=about["arch"], stem=about["stem"])
        dropout = float(about.get("dropout", 0))
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected at least 0 and below 1")
        mean, std = (cast(Statistics, tuple(float(value) for value in about[name])) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{label}: its 'twinstream' metadata is damaged: {error}") from error
    module = build_encoder(config, size)
    if dropout > 0:  # off in evaluation, unless trainers.dropout.mc_dropout turns it on
        add_dropout(module, dropout)
    load_strict(module, tensors, label)
    identity = weights_hash(tensors)
    return FrozenEncoder(label, module, size, mean, std, identity, folder, config, data)


def weights_hash(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
