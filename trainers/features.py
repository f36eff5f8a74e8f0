"""Frozen features: an encoder in eval mode, applied once to a split and cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.config import LoaderConfig
from pipelines.foreign import MOST_RECIPE, load_json, load_yaml, read_text
from pipelines.plain_views import plain_batches, ten_crop_batches
from pipelines.sources import DataConfig, Source
from trainers.dropout import add_dropout
from trainers.encoders import EncoderConfig, build_encoder
from trainers.state import CheckpointError, damage_named, find_checkpoint, load_strict
from trainers.weights import check_state, image_facts, load_metadata, load_tensors, save_tensors

BATCH_SIZE = 256
Statistics = tuple[float, float, float]
T = TypeVar("T")


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
        about, tensors = load_metadata(path).get("twinstream"), load_tensors(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
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
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Features [N, d] float32 of a source in its order, from the cache if weights and data are those of last time.

    On the host, and mapped from the cache: what is not read takes no memory. With ``ten_crop`` [crops, N, d], of the
    crops that `ten_crop_batches` makes. With a group each rank extracts its share; they must see the same folder.
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
    cached = _cached(path, len(source))
    # The first rank decides for all: another evaluation may put the file there just now.
    missing, token = _from_first((cached is None, os.getpid()), group)
    if not missing and cached is not None:
        return cached
    path.parent.mkdir(parents=True, exist_ok=True)
    if missing and group is None:
        _store(path, extract(encoder, source, device, loading, ten_crop=ten_crop))
    elif missing and group is not None:
        _extract_together(path, encoder, source, device, loading, ten_crop, group, token)
    cached = _cached(path, len(source))
    if cached is None:
        raise CheckpointError(f"{path} is gone, or this process does not see what the others wrote there")
    return cached


def _extract_together(
    path: Path,
    encoder: FrozenEncoder,
    source: Source,
    device: torch.device,
    loading: LoaderConfig | None,
    ten_crop: bool,
    group: dist.ProcessGroup,
    token: int,
) -> None:
    """Each rank writes the features of its share of the images, and the first puts them together."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    bounds = [len(source) * part // world for part in range(world + 1)]
    parts = [path.with_suffix(f".{token}.part{part}-of-{world}") for part in range(world)]
    share = source.select(torch.arange(bounds[rank], bounds[rank + 1]))
    _store(parts[rank], extract(encoder, share, device, loading, ten_crop=ten_crop))
    dist.barrier(group=group)
    if rank == 0:
        if missing := [part.name for part in parts if not part.exists()]:
            raise CheckpointError(f"{path.parent} lacks {missing[0]}: all processes must see the same folder")
        _store(path, torch.cat([load_file(part)["features"] for part in parts], dim=-2))
        for part in parts:
            part.unlink()
    dist.barrier(group=group)


def _from_first(value: T, group: dist.ProcessGroup | None) -> T:
    """The first rank's value, on every rank."""
    if group is None:
        return value
    held: list[T] = [value]
    dist.broadcast_object_list(held, src=0, group=group)
    return held[0]


def _store(path: Path, features: Tensor) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_tensors(draft, {"features": features})
    draft.replace(path)


def _cached(path: Path, images: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        features = load_tensors(path)["features"]
    except Exception as error:  # a damaged cache costs a recomputation, nothing else
        print(f"{path} cannot be read ({error}); extracting again")
        return None
    return features if features.ndim >= 2 and features.shape[-2] == images else None


@torch.no_grad()
def extract(
    encoder: FrozenEncoder,
    source: Source,
    device: torch.device,
    loading: LoaderConfig | None = None,
    *,
    ten_crop: bool = False,
) -> Tensor:
    """Features [N, d] float32 on the host, or [crops, N, d]. The encoder, in eval mode, comes out as it went in."""
    source = replace(source, mean=encoder.mean, std=encoder.std)  # as the encoder was trained
    with frozen(encoder, device) as module:
        make = ten_crop_batches if ten_crop else plain_batches
        found = Tensor()
        for images, positions in make(source, encoder.image_size, BATCH_SIZE, device, loading):
            rows = torch.stack([module(crop) for crop in images]) if ten_crop else module(images)
            if not found.numel():  # at once for all images: joining parts would take the memory twice
                found = torch.empty(*rows.shape[:-2], len(source), rows.shape[-1])
            found[..., positions, :] = rows.cpu()
        return found


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
    same = {name: torch.allclose(b, before[name], rtol=0, atol=0, equal_nan=True) for name, b in module.named_buffers()}
    changed = [name for name, is_same in same.items() if not is_same]
    assert not changed, f"evaluation changed the frozen encoder: {changed}"


def _from_run(run: Path) -> FrozenEncoder:
    recipe_path = run / "recipe.yaml"
    if not recipe_path.exists():
        raise CheckpointError(f"{run} is not a run folder: it has no recipe.yaml")
    try:
        data = DataConfig(**load_yaml(read_text(recipe_path, MOST_RECIPE))["data"])
    except (yaml.YAMLError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{recipe_path} is damaged: {error}") from error
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no whole checkpoint yet")
    with damage_named(checkpoint):
        tensors = {
            name.removeprefix("encoder."): value
            for name, value in load_tensors(checkpoint / "method.safetensors").items()
            if name.startswith("encoder.")
        }
        state = check_state(load_json(read_text(checkpoint / "state.json")))
        about = json.dumps(state["encoder"])
    label = f"{run.name} ({checkpoint.name})"
    encoder = _assemble(label, tensors, about, run / "evaluations", data)
    return replace(encoder, step=state["step"])


def _assemble(
    label: str, tensors: dict[str, Tensor], metadata: str, folder: Path, data: DataConfig | None
) -> FrozenEncoder:
    try:
        about = load_json(metadata)
        size, mean, std = image_facts(about)
        config = EncoderConfig(arch=about["arch"], stem=about["stem"])
        dropout = float(about.get("dropout", 0))
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected at least 0 and below 1")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
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
