"""What is augmented once more: the pixels are found again, and draws belong to a step and an image alone."""

import torch
from torch import Tensor

from pipelines.views import PLANS, View
from trainers.parts.representations.augmentation import augment_again

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEW = PLANS["mvmr"][1]


def pixels(count: int = 12, size: int = 20) -> Tensor:
    """[N, 3, H, H] of all 256 values."""
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0))


def normalised(values: Tensor) -> Tensor:
    return (values / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def again(images: Tensor, view: View = VIEW, step: int = 0, indices: Tensor | None = None) -> Tensor:
    indices = torch.arange(len(images)) if indices is None else indices
    return augment_again(images, view, mean=MEAN, std=STD, seed=0, step=step, indices=indices)


def test_pixels_are_found_again():
    values = pixels()
    assert (again(normalised(values), View()) - normalised(values)).abs().max() < 1e-6
    mirrored = again(normalised(values).double(), View(flip=1.0))
    assert (mirrored - normalised(values.flip(-1))).abs().max() < 1e-6


def test_draws_depend_on_step_and_index_alone():
    images = normalised(pixels())
    whole = again(images, step=3)
    some = torch.tensor([7, 2, 11])
    assert torch.equal(again(images[some], step=3, indices=some), whole[some])
    same_image = images[:1].expand(6, -1, -1, -1)
    several = again(same_image, step=3)
    for other in range(1, 6):
        assert not torch.equal(several[0], several[other])
    assert not torch.equal(again(images, step=4), whole)


def test_policies_are_applied():
    images = normalised(pixels())
    inverted = View(policy="autoaugment_svhn")
    found = again(images, inverted)
    assert not torch.equal(found, again(images, View()))
    assert torch.equal(found, again(images, inverted))
