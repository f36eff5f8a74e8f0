"""A grid of linear heads against each head alone, as torch.nn.Linear with torch.optim."""

import pytest
import torch
from torch import Tensor, nn

from trainers.head_grid import Head, HeadGrid, grid

WIDTHS = {"pooled": 12, "standardised": 7}
CLASSES = 5


def batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            {name: torch.randn(size, width, generator=generator) for name, width in WIDTHS.items()},
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in (16, 16, 3, 16, 1)
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_head_moves_as_it_would_alone(optimizer: str) -> None:
    heads = grid(("pooled", "standardised"), (0.3, 0.01), (0.0, 1e-2))
    assert len(heads) == 8
    assert heads[3] == Head("pooled", 0.01, 1e-2)
    together = HeadGrid(heads, WIDTHS, CLASSES, optimizer=optimizer, seed=1, device=torch.device("cpu"))
    test, _ = batches()[0]
    starts = together.logits(test)
    assert starts.shape == (8, 16, CLASSES)
    alone = []
    for place, head in enumerate(heads):
        linear = nn.Linear(WIDTHS[head.features], CLASSES)
        bank = together.banks[head.features]
        own = bank.places.tolist().index(place)
        linear.weight.data.copy_(bank.weight[own])
        linear.bias.data.copy_(bank.bias[own])
        groups = [
            {"params": [linear.weight], "weight_decay": head.weight_decay},
            {"params": [linear.bias], "weight_decay": 0.0},
        ]
        kind = (
            torch.optim.SGD(groups, head.lr, momentum=0.9) if optimizer == "sgd" else torch.optim.Adam(groups, head.lr)
        )
        alone.append((linear, kind))
    for number, (features, labels) in enumerate(batches()):
        factor = 1 / (1 + number)
        losses = together.step(features, labels, factor)
        for place, (linear, kind) in enumerate(alone):
            head = heads[place]
            for group in kind.param_groups:
                group["lr"] = head.lr * factor
            kind.zero_grad()
            loss = nn.functional.cross_entropy(linear(features[head.features]), labels)
            loss.backward()
            kind.step()
            assert losses[place].item() == pytest.approx(loss.item(), rel=1e-5)
    found = together.logits(test)
    for place, (linear, _) in enumerate(alone):
        expected = linear(test[heads[place].features]).detach()
        torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.head_logits(place, test), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(starts[place], expected, atol=1e-2), "the head has moved"
