"""Views come as the encoder's first convolution wants them: the concatenated batch is no copy, and channels_last."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.loading import render
from pipelines.views import ViewsConfig


@pytest.mark.parametrize("override", [{}, {"policy": "randaugment"}])
def test_the_concatenated_views_are_channels_last_without_a_copy(override: dict[str, Any]) -> None:
    plan = ViewsConfig(plan="simclr_cifar", override=override).resolve()
    crops = torch.randint(0, 256, (len(plan), 5, 16, 16, 3), dtype=torch.uint8)
    source: Any = SimpleNamespace(labels=torch.arange(5), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    batch = render(source, plan, crops, torch.arange(5), seed=0, epoch=0)
    joined = batch.views.flatten(0, 1)
    assert joined.data_ptr() == batch.views.data_ptr()
    assert joined.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.indices_on_host(), batch.indices)
