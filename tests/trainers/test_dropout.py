"""Dropout with a switch: where it is put, that names stay, that it is off unless asked for; and what its passes say."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kernels import simplex_loss
from tests.distributed import run_ranks
from tests.trainers.small_runs import make_method
from trainers.dropout import MCDropout, add_dropout, dropout_rate, mc_dropout
from trainers.encoders import EncoderConfig, build_encoder
from trainers.features import load_encoder
from trainers.posterior import evaluating, mc_passes, posterior, posterior_statistics
from trainers.state import CheckpointError


def encoder(arch: str = "resnet8x4", rate: float = 0.4) -> nn.Module:
    torch.manual_seed(0)
    network = build_encoder(EncoderConfig(arch=arch), 32)
    if rate:
        add_dropout(network, rate)
    return network


@pytest.mark.parametrize(("arch", "stages"), [("resnet18", 4), ("resnet50", 4), ("resnet8x4", 3)])
def test_it_follows_the_stem_and_every_stage_and_parameters_keep_their_names(arch: str, stages: int) -> None:
    plain, dropped = encoder(arch, 0), encoder(arch)
    assert list(plain.state_dict()) == list(dropped.state_dict())
    dropped.load_state_dict(plain.state_dict(), strict=True)
    places = [name for name, module in dropped.named_modules() if isinstance(module, MCDropout)]
    blocks = [len(getattr(plain, f"layer{number}")) for number in range(1, stages + 1)]
    assert places == ["relu.1", *(f"layer{number}.{count}" for number, count in enumerate(blocks, 1))]
    assert dropout_rate(dropped) == 0.4
    assert dropout_rate(plain) == 0

    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain.eval()(images), dropped.eval()(images))


def test_where_it_drops_and_how_much() -> None:
    seen = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen[name] = (inputs[0].detach(), output.detach())

        return hook

    network = encoder(rate=0.25).train()
    for name, module in network.named_modules():
        if isinstance(module, MCDropout):
            module.register_forward_hook(note(name))
    network(torch.randn(8, 3, 32, 32))
    assert list(seen) == ["relu.1", "layer1.1", "layer2.1", "layer3.1"]
    for before, after in seen.values():
        assert before.min() >= 0  # behind a ReLU
        kept = after != 0
        torch.testing.assert_close(after[kept], before[kept] / 0.75)
        was = before != 0
        assert (~kept & was).sum().item() / was.sum().item() == pytest.approx(0.25, abs=0.02)


def test_modes_follow_training_or_the_switch_and_come_back() -> None:
    network = encoder()
    images = torch.randn(2, 3, 32, 32)

    def varies() -> bool:
        with torch.no_grad(), torch.random.fork_rng():
            return not torch.equal(network(images), network(images))

    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # so that nothing else could vary
    assert varies()
    with mc_dropout(network, active=False):
        assert not varies()
        with mc_dropout(network):
            assert varies()
        assert not varies()
    network.eval()
    assert not varies()
    with mc_dropout(network):
        assert varies()
    assert not varies()
    with pytest.raises(KeyError), mc_dropout(network):
        raise KeyError
    assert not varies()


def test_survives_copies_and_channels_last() -> None:
    network = encoder().eval()
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    copied = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(copied(images), network(images), rtol=1e-4, atol=1e-5)
    with mc_dropout(copied):
        assert next(m for m in copied.modules() if isinstance(m, MCDropout)).active
        assert not next(m for m in network.modules() if isinstance(m, MCDropout)).active
        maps = copied.relu(torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last))
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_a_sequential_takes_it_after_each_of_its_relus() -> None:
    head = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    names = list(head.state_dict())
    add_dropout(head, 0.5)
    assert list(head.state_dict()) == names
    assert [name for name, module in head.named_modules() if isinstance(module, MCDropout)] == ["1.1", "3.1"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Linear cannot take dropout.*ReLU"):
        add_dropout(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="no dropout yet"):
        add_dropout(encoder(), 0.1)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"rate is {rate}"):
            MCDropout(rate)


@pytest.mark.parametrize("rate", [0.0, 0.4, None])
def test_whoever_loads_an_exported_encoder_gets_its_dropout_switched_off(tmp_path: Path, rate: float | None) -> None:
    about = {"arch": "resnet8x4", "stem": "auto", "image_size": 8, "mean": [0.3] * 3, "std": [0.4] * 3}
    about |= {} if rate is None else {"dropout": rate}  # None: an export of before there was any
    network = encoder(rate=rate or 0)
    path = tmp_path / "encoder.safetensors"
    save_file(network.state_dict(), path, metadata={"twinstream": json.dumps(about)})
    loaded = load_encoder(path).module.eval()
    images = torch.randn(2, 3, 8, 8)
    assert dropout_rate(loaded) == (rate or 0)
    assert torch.equal(loaded(images), network.eval()(images))
    with mc_dropout(loaded):
        assert torch.equal(loaded(images), network(images)) == (not rate)


def test_a_damaged_rate_is_refused(tmp_path: Path) -> None:
    about = {"arch": "resnet8x4", "stem": "auto", "image_size": 8, "mean": [0.3] * 3, "std": [0.4] * 3, "dropout": 2}
    path = tmp_path / "encoder.safetensors"
    save_file(encoder(rate=0).state_dict(), path, metadata={"twinstream": json.dumps(about)})
    with pytest.raises(CheckpointError, match=r"damaged: dropout is 2\.0"):
        load_encoder(path)


def posterior_of(row: list[float], beta: float) -> list[float]:
    u = [math.log1p(math.exp(beta * value)) / beta for value in row]
    return [value / sum(u) for value in u]


@pytest.mark.parametrize("beta", [0.8, 3.0])
def test_posterior_is_its_formula(beta: float) -> None:
    z = 2 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = posterior(z, beta)
    for i, row in enumerate(z.tolist()):
        expected = posterior_of(row, beta)
        assert found.probabilities[i].tolist() == pytest.approx(expected, rel=1e-12)
        assert found.entropy[i].item() == pytest.approx(-sum(p * math.log(p) for p in expected), rel=1e-12)
        assert found.confidence[i].item() == pytest.approx(max(expected), rel=1e-12)


def test_posterior_is_the_one_that_the_loss_reads() -> None:
    """At floor -> 0 and T = 1 the loss of two images is known from their posteriors' inner products."""
    z1, z2 = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    r = (posterior(z1).probabilities @ posterior(z2).probabilities.T).tolist()
    rows = [r[i][i] / sum(r[i]) for i in range(2)] + [r[i][i] / (r[0][i] + r[1][i]) for i in range(2)]
    expected = -sum(math.log(share) for share in rows) / 4
    assert simplex_loss(z1, z2, temperature=1, floor=1e-9).item() == pytest.approx(expected, rel=1e-12)


def test_posteriors_far_below_zero_are_still_distributions() -> None:
    z = torch.tensor([[-500.0, -501.0, -900.0], [500.0, 0.0, -500.0]])
    found = posterior(z)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(2))
    assert found.probabilities[0, 0].item() == pytest.approx(1 / (1 + math.exp(-0.8)), rel=1e-5)
    assert torch.isfinite(found.entropy).all()


class Coin(nn.Module):
    """Outputs that a pass multiplies by 0 or 2: all of its statistics are known."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = MCDropout(0.5)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.norm(images)  # would move its statistics in training
        return images * self.dropout(torch.ones(1, images.shape[1]))


def test_passes_against_two_plain_loops() -> None:
    network = Coin().train()
    network.norm.eval()
    images = torch.tensor([[3.0], [-1.0]]).expand(2, 1)
    torch.manual_seed(0)
    with mc_dropout(network), torch.no_grad():
        outputs = torch.stack([network(images) for _ in range(6)]).double()
    torch.manual_seed(0)
    found = mc_passes(network, images, 6)
    torch.testing.assert_close(found.mean.double(), outputs.mean(0))
    torch.testing.assert_close(found.variance.double(), outputs.var(0))
    assert network.training
    assert not network.norm.training  # each part as it was
    assert network.norm.num_batches_tracked == 0


def test_entropies_of_passes_against_their_definition() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    add_dropout(network, 0.5)
    images = 3 * torch.randn(5, 4)
    torch.manual_seed(1)
    found = mc_passes(network, images, 7, beta=2.0)
    torch.manual_seed(1)
    with mc_dropout(network), torch.no_grad():
        outputs = torch.stack([network(images) for _ in range(7)])
    for i in range(5):
        posteriors = [posterior_of(outputs[t, i].tolist(), 2.0) for t in range(7)]
        mean = [sum(p[c] for p in posteriors) / 7 for c in range(3)]
        entropies = [-sum(p * math.log(p) for p in one) for one in (*posteriors, mean)]
        assert found.probabilities[i].tolist() == pytest.approx(mean, rel=1e-4)
        assert found.predictive_entropy[i].item() == pytest.approx(entropies[-1], rel=1e-4)
        assert found.mutual_information[i].item() == pytest.approx(entropies[-1] - sum(entropies[:-1]) / 7, abs=1e-5)
        assert found.mutual_information[i] > 1e-3


def test_passes_of_a_method_are_of_its_projections_and_its_beta() -> None:
    method = make_method("probsimclr", {"dropout": 0.3, "beta": 2.0, "projector": {"output": 6}}, dtype=torch.float32)
    images = torch.randn(4, 3, 8, 8)
    torch.manual_seed(2)
    found = mc_passes(method, images, 3)
    assert method.training
    torch.manual_seed(2)
    with evaluating(method), mc_dropout(method), torch.no_grad():
        outputs = torch.stack([method.embed(images[None])["z"][0] for _ in range(3)])
    torch.testing.assert_close(found.mean, outputs.mean(0))
    probabilities = torch.stack([posterior(z, 2.0).probabilities for z in outputs]).mean(0)
    torch.testing.assert_close(found.probabilities, probabilities)
    assert (found.variance > 0).any()


def test_passes_that_would_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ResNet8x4 has no dropout.*method\.dropout"):
        mc_passes(encoder(rate=0), torch.zeros(1, 3, 32, 32), 5)
    with pytest.raises(ValueError, match=r"passes=1.*at least 2"):
        mc_passes(encoder(), torch.zeros(1, 3, 32, 32), 1)


def statistics_of(group, pair: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return posterior_statistics(*(view.chunk(world_size)[rank] for view in pair), 0.8, group)


def test_statistics_over_ranks_against_plain_loops() -> None:
    pair = tuple(2 * torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    views = [[posterior_of(row, 0.8) for row in view.tolist()] for view in pair]
    both = views[0] + views[1]
    mean = [sum(p[c] for p in both) / 12 for c in range(4)]
    entropy = sum(-p * math.log(p) for one in both for p in one) / 12
    expected = {
        "posterior_entropy": entropy,
        "posterior_confidence": sum(max(one) for one in both) / 12,
        "posterior_agreement": sum(p * q for a, b in zip(*views, strict=True) for p, q in zip(a, b, strict=True)) / 6,
        "posterior_information": -sum(p * math.log(p) for p in mean) - entropy,
    }
    for found in run_ranks(2, statistics_of, pair):
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-10)
