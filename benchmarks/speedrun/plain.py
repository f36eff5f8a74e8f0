"""The loop of the SimCLR code bases, as `benchmarks/end_to_end_contenders.py` has it, an epoch at a time."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.end_to_end_contenders import Loop, NTXent, plain_view
from benchmarks.speedrun.data import Data, Part

LR = 3e-4


class PlainLoop:
    """Pillow and torchvision in worker processes for each view, one forward a view, the whole matrix of logits with a
    mask, a projector without BatchNorm, Adam at a constant rate, the loss read in every step.

    Images lie in memory as torchvision's CIFAR10 keeps them, so nothing is decoded. A new pass is begun by the loader
    only when one is asked for: nothing is prepared while others train.
    """

    def __init__(self, data: Data, arch: str, *, epochs: int, batch: int, workers: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.loop = Loop(arch, data.side, NTXent())
        self.optimizer = torch.optim.Adam(self.loop.parameters(), lr=LR)
        self.loader = torch.utils.data.DataLoader(
            _Views(data.train, data.side),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self.left = epochs

    def epoch(self) -> float:
        """One pass over the training part; the mean loss."""
        losses = []
        for x1, x2 in self.loader:
            loss = self.loop(x1, x2)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        self.left -= 1
        return sum(losses) / len(losses)

    @property
    def done(self) -> bool:
        return self.left <= 0

    @property
    def encoder(self) -> nn.Module:
        encoder: nn.Module = self.loop.encoder
        return encoder


class _Views(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, part: Part, side: int) -> None:
        self.images, self.view = part.images.numpy(), plain_view(side)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        image = Image.fromarray(self.images[row])
        return self.view(image), self.view(image)
