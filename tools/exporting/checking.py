"""A written file is loaded as its users will, and must give the encoder's features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import normalize

from tools.exporting.job import ExportError, Job

LIMIT = 1e-4  # of the largest deviation over the largest feature
BATCHES = (1, 5)  # graphs are traced with two images


@torch.no_grad()
def largest_deviation(job: Job, features_of: Callable[[Tensor], Tensor]) -> float:
    """The largest |difference| of two encoders' features of random images, over the largest |feature|.

    Raises:
        ExportError: it is above ``LIMIT``, or features are not finite, all zero or of another shape.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for n in BATCHES:
        shape = (n, 3, job.size, job.size)
        if job.normalisation:
            images = torch.rand(shape, generator=generator)
            expected = job.module(normalize(images, job.about["mean"], job.about["std"]))
        else:
            images = torch.randn(shape, generator=generator)
            expected = job.module(images)
        scale = expected.abs().max().item()
        if not 0 < scale < float("inf"):
            raise ExportError(f"{job.output} was not written: the encoder's features are all zero or not finite")
        found = features_of(images)
        if found.shape != expected.shape:
            shapes = f"{list(found.shape)}, the encoder's are {list(expected.shape)}"
            raise ExportError(f"{job.output} was not written: its features would be {shapes}")
        deviation = (found - expected).abs().max().item() / scale
        if not deviation <= LIMIT:  # NaN is above any limit
            off = f"off by {deviation:.2g} of the largest, and {LIMIT:g} is the limit"
            raise ExportError(f"{job.output} was not written: its features would be {off}")
        worst = max(worst, deviation)
    return worst
