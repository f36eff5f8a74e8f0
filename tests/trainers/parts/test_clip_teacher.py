"""The teacher: what it is shown, what it gives, where its weights come from, and how it says that they are missing."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.sources import DataError
from tests.trainers.parts.tiny_clip import MEAN, RESNET, STD, VIT, model_config, write_teacher
from trainers.parts.clip_teacher import ClipTeacher

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (pip install 'twinstream[clip]')")

VIEW_MEAN, VIEW_STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def known(tiny: Path) -> str:
    """The name under which open_clip knows this model, as it knows ViT-B-16: without weights."""
    (tiny / "tiny-twinstream.json").write_text(json.dumps(model_config()))
    open_clip.add_model_config(tiny / "tiny-twinstream.json")
    return "tiny-twinstream"


def teacher(name: str | Path, pretrained: str | Path | None = None, **changes: Any) -> ClipTeacher:
    name = f"local-dir:{name}" if isinstance(name, Path) else name
    weights = None if pretrained is None else str(pretrained)
    return ClipTeacher(name, weights, **({"mean": VIEW_MEAN, "std": VIEW_STD} | changes))


def photographs(count: int, size: int) -> np.ndarray:
    """[count, size, size, 3] uint8, parts of two photographs."""
    both = load_sample_images().images
    return np.stack([both[i % 2][3 * i : 3 * i + size, 5 * i : 5 * i + size] for i in range(count)])


def views_of(images: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """As every loader normalises them."""
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (VIEW_MEAN, VIEW_STD))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std


@pytest.mark.parametrize("size", [8, 16, 40])  # enlarged, as it is, reduced
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_are_shown_as_the_clip_model_takes_images(tiny: Path, interpolation: Any, size: int) -> None:
    """Against Pillow's resize, channel by channel in float32, and the model's own mean and std."""
    images = photographs(3, size)
    shown = teacher(tiny, interpolation=interpolation).prepare(views_of(images))
    assert shown.shape == (3, 3, 16, 16)
    method = Image.Resampling[interpolation.upper()]
    for image, found in zip(images, shown, strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32) / 255)
            resized = np.asarray(plane.resize((16, 16), method)).clip(0, 1)
            assert np.abs(found[channel].numpy() - (resized - MEAN[channel]) / STD[channel]).max() < 1e-5


def test_outputs_are_those_of_open_clip(tiny: Path) -> None:
    """From the image file to the embedding by open_clip's own transform, of 16 bits in the end."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    images = photographs(70, 16)  # more than are embedded at a time
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([transform(Image.fromarray(image)) for image in images]))
    found = teacher(tiny).embed(views_of(images))
    assert found.dtype == torch.float16
    assert found.shape == (70, 24)
    assert (found - expected).norm() / expected.norm() < 1e-3
    assert (expected - expected.mean(0)).norm() / expected.norm() > 0.3, "images are told apart"


def test_the_published_code_shows_views_with_the_data_sets_statistics(tiny: Path) -> None:
    views = views_of(photographs(4, 16))
    assert torch.equal(teacher(tiny, own_statistics=False).prepare(views), views)
    assert not torch.equal(teacher(tiny).embed(views), teacher(tiny, own_statistics=False).embed(views))


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_an_image_gives_the_same_bits_whatever_comes_with_it(tmp_path: Path, vision: dict[str, Any]) -> None:
    """Else a resumed run, whose table is filled in another order, would not be the run that it goes on with."""
    write_teacher(tmp_path, vision)
    own = teacher(tmp_path)
    views = views_of(photographs(100, 24), torch.float32)
    whole = own.embed(views)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(own.embed(views[order]), whole[order])
    assert torch.equal(own.embed(views[71:74]), whole[71:74])
    assert own.embed(views[:0]).shape == (0, 24)
    assert torch.equal(own.embed(views), whole), "BatchNorm stays as it was"


def test_nothing_is_trained_and_nothing_is_kept_for_a_gradient(tiny: Path) -> None:
    own = teacher(tiny)
    views = views_of(photographs(2, 16)).requires_grad_()
    assert not own.embed(views).requires_grad
    assert not isinstance(own, torch.nn.Module)


def test_loading_leaves_logging_and_random_numbers_alone(tiny: Path) -> None:
    before, state = list(logging.getLogger().handlers), torch.get_rng_state()
    teacher(tiny)
    assert logging.getLogger().handlers == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_local_weights(tiny: Path, known: str, tmp_path: Path, suffix: str) -> None:
    path = tiny / "open_clip_model.safetensors"
    if suffix != "safetensors":
        model = open_clip.create_model(f"local-dir:{tiny}")
        path = tmp_path / f"weights.{suffix}"
        torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    images = photographs(2, 16)
    own = teacher(known, path)
    shown = (
        torch.from_numpy(images[0, 0, 0]) / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073])
    ) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert (own.prepare(views_of(images))[0, :, 0, 0] - shown).abs().max() < 1e-6, "CLIP's usual statistics"
    embedded = open_clip.create_model(f"local-dir:{tiny}").eval().visual(own.prepare(views_of(images)).float())
    assert (own.embed(views_of(images)) - embedded).norm() < 1e-3 * embedded.norm()


class Exploit:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploited",)


def test_weights_that_are_programs_are_not_run(known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Exploit()}, tmp_path / "bad.pt")
    with pytest.raises(DataError, match=r"bad\.pt does not hold the weights of tiny-twinstream .* a program"):
        teacher(known, tmp_path / "bad.pt")
    assert not (tmp_path / "exploited").exists()


def test_what_is_missing_or_wrong_is_named(tiny: Path, known: str, tmp_path: Path) -> None:
    weights = tiny / "open_clip_model.safetensors"
    with pytest.raises(DataError, match=r"teacher=ViT-B16: open_clip has no such model \(nearest: ViT-B-16\)"):
        teacher("ViT-B16", "laion400m_e32")
    with pytest.raises(DataError, match=r"pretrained=laion400m_e33 is neither a file .* \(nearest: laion400m_e3"):
        teacher("ViT-B-16", "laion400m_e33")
    with pytest.raises(DataError, match=r"pretrained=gone\.pt is neither a file .*there are none"):
        teacher(known, "gone.pt")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected weights as \.safetensors"):
        teacher(known, tmp_path / "weights.npz")
    with pytest.raises(DataError, match=r"safetensors does not hold the weights of ViT-S-32"):
        teacher("ViT-S-32", weights)
    with pytest.raises(DataError, match=r"teacher=local-dir:.*needs open_clip_config\.json and open_clip_model"):
        teacher(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config()}))
    with pytest.raises(DataError, match=r"teacher=local-dir:.*needs open_clip_config\.json and open_clip_model"):
        teacher(tmp_path)
    with pytest.raises(DataError, match=r"QuickGELU, .*; set method\.teacher=ViT-B-16-quickgelu"):
        teacher("ViT-B-16", "openai")


def test_without_a_network_it_says_how_to_get_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError) as caught:
        teacher("ViT-B-16", "laion400m_e32")
    message = str(caught.value)
    for part in (
        "method.pretrained=laion400m_e32 (of method.teacher=ViT-B-16) is not on this machine",
        "hf download timm/vit_base_patch16_clip_224.laion400m_e32 open_clip_model.safetensors --local-dir teacher",
        "set method.pretrained=teacher/open_clip_model.safetensors",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(DataError) as caught:
        teacher("ViT-B-16-SigLIP", "webli")  # other statistics, which the weights alone do not say
    assert "open_clip_config.json --local-dir teacher" in str(caught.value)
    assert "set method.teacher=local-dir:teacher method.pretrained=null" in str(caught.value)
    with pytest.raises(DataError, match=r"hf download some/model --local-dir teacher; .* method\.teacher=local-dir:te"):
        teacher("hf-hub:some/model")


def test_without_open_clip_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(DataError, match=r"pip install 'twinstream\[clip\]'"):
        teacher(tiny)
