"""A small data set and a recipe for the tests of the speedrun."""

from dataclasses import replace

import torch

from benchmarks.speedrun.data import Data, Part
from benchmarks.speedrun.recipe import DIGITS

CPU = torch.device("cpu")
TINY = replace(DIGITS, batch=8, epochs=2, hidden=16, output=8, sizes=((0.0, 8), (0.5, 12)), average=0.5)


def stripes(count: int = 32, side: int = 12) -> Data:
    """Two classes that pixels tell apart: upright and lying stripes, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    wave = ((torch.arange(side) // 2) % 2 * 200).expand(side, side)
    patterns = torch.stack([wave, wave.T])[labels][..., None].expand(-1, -1, -1, 3)
    images = (patterns + torch.randint(0, 50, patterns.shape, generator=generator)).to(torch.uint8)
    part = Part(images, labels)
    return Data(part, part.select(torch.arange(8)), part.select(torch.arange(8, 20)), 2, (0.5,) * 3, (0.25,) * 3)
