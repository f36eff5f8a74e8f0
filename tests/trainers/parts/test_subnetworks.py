"""Batched subnetworks against as many small networks of torch, and the scores' winners against loops over pairs."""

import math

import pytest
import torch
from torch import nn

from kernels import bregman_loss
from tests.distributed import run_ranks
from trainers.parts.subnetworks import Subnetworks, SubnetworksConfig
from trainers.parts.winners import draw_negatives, margin_loss, usage_divergence, winner_statistics


def as_networks(subnetworks: Subnetworks) -> list[nn.Sequential]:
    """Torch's own layers with the same weights."""
    networks = []
    for k in range(len(subnetworks.layers[0].weight)):
        modules: list[nn.Module] = []
        for layer in subnetworks.layers:
            weight = layer.weight[k].detach()
            linear = nn.Linear(*weight.shape).to(weight.dtype)
            linear.load_state_dict({"weight": weight.T, "bias": layer.bias[k].detach()})
            modules += [linear, nn.ReLU()]
        networks.append(nn.Sequential(*modules[:-1]))
    return networks


@pytest.mark.parametrize("widths", [(1,), (7, 1), (7, 5, 1)])
@pytest.mark.parametrize("normalise", [True, False])
def test_scores_and_gradients_are_those_of_separate_networks(
    widths: tuple[int, ...], normalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "trainers.parts.subnetworks._CPU_TILE", 13 * 7 * 2
    )  # two subnetworks at a time, and one left over
    torch.manual_seed(0)
    config = SubnetworksConfig(count=5, widths=widths, dropout=0, normalise=normalise)
    subnetworks = Subnetworks(6, config).double()
    networks = as_networks(subnetworks)
    z = (3 * torch.randn(13, 6, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(13, 5, dtype=torch.float64)

    scores = subnetworks(z)
    (gradient,) = torch.autograd.grad((scores * upstream).sum(), z, retain_graph=True)
    (scores * upstream).sum().backward()
    rows = z / z.norm(dim=1, keepdim=True) if normalise else z
    expected = torch.cat([network(rows) for network in networks], 1)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), z, retain_graph=True)
    (expected * upstream).sum().backward()

    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-12)
    for number, layer in enumerate(subnetworks.layers):
        for k, network in enumerate(networks):
            torch.testing.assert_close(layer.weight.grad[k], network[2 * number].weight.grad.T, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(layer.bias.grad[k], network[2 * number].bias.grad, rtol=1e-11, atol=1e-12)


def test_dropout_drops_at_its_rate_keeps_the_mean_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    subnetworks = Subnetworks(4, SubnetworksConfig(count=2, widths=(30_000, 1), dropout=0.3)).double()
    with torch.no_grad():
        subnetworks.layers[0].weight.zero_()
        subnetworks.layers[0].bias.fill_(1.0)
        subnetworks.layers[1].weight.fill_(1 / 30_000)
        subnetworks.layers[1].bias.zero_()
    z = torch.randn(20, 4, dtype=torch.float64)
    # Each score is the mean of 30,000 activations, each 0 or 1/0.7: of mean 1 and deviation sqrt(0.3/0.7/30,000).
    scores = subnetworks(z)
    deviation = math.sqrt(0.3 / 0.7 / 30_000)
    assert (scores - 1).abs().max() < 4.5 * deviation
    # Of 40 scores whose activations are dropped independently, whatever their row and subnetwork.
    assert scores.std().item() == pytest.approx(deviation, rel=0.4)
    assert not torch.equal(scores, subnetworks(z))
    torch.testing.assert_close(subnetworks.eval()(z), torch.ones(20, 2, dtype=torch.float64))


def test_dropout_is_an_activation_s_own_and_its_gradient_follows_it() -> None:
    torch.manual_seed(0)
    subnetworks = Subnetworks(3, SubnetworksConfig(count=4, widths=(16, 1), dropout=0.5))
    with torch.no_grad():
        subnetworks.layers[0].bias.fill_(10.0)  # no activation is negative
    subnetworks(torch.randn(1, 3)).sum().backward()
    passed = subnetworks.layers[0].bias.grad != 0  # [K, w]: which activations the row's gradient passed
    used = subnetworks.layers[1].weight.grad[..., 0] != 0
    assert torch.equal(passed, used)
    assert 0.2 < passed.float().mean() < 0.8
    torch.testing.assert_close(
        subnetworks.layers[0].bias.grad[passed], subnetworks.layers[1].weight.detach()[..., 0][passed] / 0.5
    )


def test_starts_as_torch_s_linear_layers_do() -> None:
    torch.manual_seed(0)
    layers = Subnetworks(50, SubnetworksConfig(count=40, widths=(60, 1))).layers
    for layer, into, out in ((layers[0], 50, 60), (layers[1], 60, 1)):
        theirs = [nn.Linear(into, out) for _ in range(40)]
        for name in ("weight", "bias"):
            ours, reference = getattr(layer, name), torch.stack([getattr(linear, name) for linear in theirs])
            assert ours.numel() == reference.numel()
            assert ours.abs().max() <= 1 / math.sqrt(into)
            assert ours.std().item() == pytest.approx(reference.std().item(), rel=0.2)


def test_scores_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    subnetworks = Subnetworks(6, SubnetworksConfig(count=3, widths=(8, 1), dropout=0))
    z = torch.randn(4, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        scores = subnetworks(z)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, subnetworks(z.float()))


@pytest.mark.parametrize("widths", [(), (4,), (4, 2), (0, 1)])
def test_refuses_networks_that_do_not_end_in_a_score(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of which the last is 1"):
        SubnetworksConfig(widths=widths)


def scores_of(pairs: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, pairs, count, generator=generator, dtype=torch.float64))


def test_usage_divergence_is_its_formula_and_its_gradient() -> None:
    scores = torch.cat(scores_of(6, 4)).requires_grad_()
    shares = (scores / 0.3).exp() / (scores / 0.3).exp().sum(1, keepdim=True)
    expected = sum(0.25 * math.log(0.25 / shares[:, k].mean().item()) for k in range(4))
    assert usage_divergence(scores, 0.3).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: usage_divergence(s, 0.3), scores)
    assert usage_divergence(torch.zeros(5, 4), 0.1).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lead", [0.05, 1.0, 100.0, 10_000.0])
def test_the_regulariser_leaves_the_dead_state(lead: float) -> None:
    """One subnetwork wins every view: the Bregman loss stands still, however wrong, and the regulariser does not."""
    scores1, scores2 = (0.01 * view.float() for view in scores_of(8, 5))
    for view in (scores1, scores2):
        view[:, 2] += lead
        view.requires_grad_()
    (dead,) = torch.autograd.grad(bregman_loss(scores1, scores2, temperature=0.1), scores1)
    assert dead.abs().max() == 0
    loss = usage_divergence(torch.cat([scores1, scores2]), 0.1)
    (gradient,) = torch.autograd.grad(loss, scores1)
    assert torch.isfinite(gradient).all()
    shares = (torch.cat([scores1, scores2]).detach() / 0.1).softmax(1)
    bound = (shares[:, 2].min() - 1 / 5) / 0.1
    assert bound > 0
    assert 2 * gradient[:, 2].sum() > 0.9 * bound  # both views, nearly alike


def test_descent_on_the_regulariser_ends_the_dead_state() -> None:
    scores = torch.cat(scores_of(16, 5)).float()
    bias = torch.tensor([0.0, 0.0, 30.0, 0.0, 0.0], requires_grad=True)
    optimizer = torch.optim.SGD([bias], 1.0)
    for _ in range(100):
        optimizer.zero_grad()
        usage_divergence(scores + bias, 0.5).backward()
        optimizer.step()
    assert len((scores + bias).argmax(1).unique()) == 5


def pairwise_divergence(scores: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """D [2N, 2N] by the definition, one pair at a time."""
    rows = scores.tolist()
    winners = [row.index(max(row)) for row in rows]
    chosen = weights.tolist() if weights is not None else None
    return torch.tensor(
        [
            [
                max(mine)
                - (mine[winners[j]] if chosen is None else sum(w * s for w, s in zip(chosen[j], mine, strict=True)))
                for j in range(len(rows))
            ]
            for mine in rows
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("soft", [False, True])
def test_margin_loss_is_its_formula_and_its_gradient(soft: bool) -> None:
    pair = scores_of(5, 4)
    scores = torch.cat(pair)
    weights = (scores / 0.5).softmax(1) if soft else None
    divergence = pairwise_divergence(scores, weights)
    negatives = draw_negatives(7, torch.arange(10), 5).tolist()
    expected = sum(divergence[i, (i + 5) % 10] + max(0, 1.5 - divergence[i, negatives[i]]) ** 2 for i in range(10)) / 10
    chosen = None if weights is None else tuple(weights.tensor_split(2))
    assert margin_loss(*pair, 7, margin=1.5, weights=chosen).item() == pytest.approx(expected.item(), rel=1e-12)

    def loss(scores1: torch.Tensor, scores2: torch.Tensor) -> torch.Tensor:
        chosen = tuple((view / 0.5).softmax(1) for view in (scores1, scores2)) if soft else None
        return margin_loss(scores1, scores2, 7, margin=1.5, weights=chosen)

    assert torch.autograd.gradcheck(loss, tuple(view.requires_grad_() for view in pair))


@pytest.mark.parametrize("pairs", [2, 3, 8])
def test_negatives_are_drawn_evenly_and_are_never_the_anchor_or_its_positive(pairs: int) -> None:
    anchors = torch.arange(2 * pairs)
    draws = torch.stack([draw_negatives(step, anchors, pairs) for step in range(2_000)])
    counts = torch.stack([torch.bincount(draws[:, i], minlength=2 * pairs) for i in range(2 * pairs)])
    allowed = torch.ones(2 * pairs, 2 * pairs, dtype=torch.bool)
    allowed[anchors, anchors] = False
    allowed[anchors, (anchors + pairs) % (2 * pairs)] = False
    expected = 2_000 / (2 * pairs - 2)
    assert (counts[~allowed] == 0).all()
    assert ((counts[allowed] - expected).abs() < 4.5 * math.sqrt(expected)).all()
    assert torch.equal(draw_negatives(5, anchors[3:], pairs), draws[5, 3:])  # a row's draw is its own


def test_statistics_against_counting() -> None:
    pair = scores_of(6, 5)
    scores = torch.cat(pair)
    found = winner_statistics(*pair)
    winners = scores.argmax(1).tolist()
    shares = [winners.count(k) / 12 for k in set(winners)]
    divergence = pairwise_divergence(scores, None)
    others = [divergence[i, j] for i in range(12) for j in range(12) if j not in (i, (i + 6) % 12)]
    assert found["active_subnetworks"].item() == len(shares)
    assert found["winner_entropy"].item() == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
    assert found["positive_divergence"].item() == pytest.approx(
        sum(divergence[i, (i + 6) % 12] for i in range(12)).item() / 12, rel=1e-12
    )
    assert found["negative_divergence"].item() == pytest.approx(sum(others).item() / len(others), rel=1e-12)


def share_of(group, pair: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """This rank's part of everything: values, and gradients to its scores."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mine = [view.chunk(world_size)[rank].clone().requires_grad_() for view in pair]
    soft = tuple((view / 0.5).softmax(1) for view in mine)
    losses = {
        "usage": usage_divergence(torch.cat(mine), 0.3, group),
        "hard": margin_loss(*mine, 3, group=group),
        "soft": margin_loss(*mine, 3, weights=soft, group=group),
    }
    gradients = {
        name: torch.cat(torch.autograd.grad(loss, mine, retain_graph=True)).unflatten(0, (2, -1))
        for name, loss in losses.items()
    }
    return {"losses": torch.stack(list(losses.values())).detach(), **gradients, **winner_statistics(*mine, group)}


def test_two_ranks_are_one_process() -> None:
    pair = scores_of(6, 5)
    [whole] = run_ranks(1, share_of, pair)
    parts = run_ranks(2, share_of, pair)
    for name in ("losses", "active_subnetworks", "winner_entropy", "positive_divergence", "negative_divergence"):
        for part in parts:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-12, atol=1e-12)
    for name in ("usage", "hard", "soft"):
        together = torch.cat([part[name] for part in parts], dim=1) / 2  # each is the gradient times the ranks
        torch.testing.assert_close(together, whole[name], rtol=1e-11, atol=1e-13)
