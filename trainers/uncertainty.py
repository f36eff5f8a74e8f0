"""What a classifier on a frozen encoder does not know: entropies, passes with dropout, and what doubt is good for.

Total doubt is the entropy of the mean prediction; it is the mean entropy of the passes (the images' own ambiguity) and
the mutual information between prediction and weights (what the network does not know; BALD, arXiv:1112.5745).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from trainers.dropout import mc_dropout
from trainers.posterior import entropy_of, evaluating

Head = Callable[[Tensor], Tensor]  # features [n, d] -> probabilities [n, C]


@dataclass(frozen=True, slots=True)
class Predictive:
    """Of N images, over the passes; entropies in nats."""

    probabilities: Tensor  # [N, C] mean over the passes
    entropy: Tensor  # [N] of that mean
    expected_entropy: Tensor  # [N] mean over the passes of the single entropies
    mutual_information: Tensor  # [N] the difference, not negative


@dataclass(frozen=True, slots=True)
class DropoutPasses:
    """What T passes with dropout gave; on the CPU. Variances are unbiased, over the passes of one image."""

    heads: dict[str, Predictive]
    variance: Tensor  # [N] of the features, mean over their dimensions
    dimension_mean: Tensor  # [d] of the features, mean over passes and images
    dimension_variance: Tensor  # [d] mean over the images


@torch.no_grad()
def dropout_passes(
    encoder: nn.Module,
    heads: Mapping[str, Head],
    batches: Iterable[Tensor],
    passes: int,
    *,
    seed: int,
    also: Sequence[nn.Module] = (),
) -> DropoutPasses:
    """``passes`` predictions of every image with dropout on and all else as in evaluation.

    Of the passes only running sums are kept, batch by batch. The masks depend on the seed and on how the images are
    cut into batches; torch's generators come out as they went in, and so do the modules.

    Args:
        encoder: [n, 3, H, W] -> features [n, d].
        heads: from a pass's features to probabilities.
        batches: of images [n, 3, H, W].
        passes: at least 2.
        also: modules inside the heads, whose dropout is on as well.
    """
    if passes < 2:
        raise ValueError(f"passes={passes}: a variance takes at least 2")
    modules = (encoder, *also)
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    seeds = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Predictive]] = {name: [] for name in heads}
    variances, sums, images_seen = [], [torch.zeros(())] * 2, 0
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(evaluating(module))
            stack.enter_context(mc_dropout(module))
        for images in batches:
            drawn = int(torch.randint(2**62, (), generator=seeds))
            found, mean, variance = _passes(encoder, heads, images, passes, drawn)
            for name, part in found.items():
                parts[name].append(part)
            variances.append(variance.mean(1).float().cpu())
            sums = [total.to(rows) + rows.sum(0) for total, rows in zip(sums, (mean, variance), strict=True)]
            images_seen += len(images)
    assert all(torch.equal(buffer, value) for buffer, value in before), "evaluation changed the frozen encoder"
    joined = {name: _joined(several) for name, several in parts.items()}
    mean_of_all, variance_of_all = (total.cpu() / images_seen for total in sums)
    return DropoutPasses(joined, torch.cat(variances), mean_of_all, variance_of_all)


def _passes(
    encoder: nn.Module, heads: Mapping[str, Head], images: Tensor, passes: int, seed: int
) -> tuple[dict[str, Predictive], Tensor, Tensor]:
    """Of one batch: the heads' predictions, mean and variance [n, d] of the features in float64."""
    probabilities: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    mean = squares = torch.zeros((), dtype=torch.float64, device=images.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # manual_seed seeds all of them
        torch.manual_seed(seed)
        for number in range(1, passes + 1):
            features = encoder(images).float()
            wide = features.double()
            before, mean = mean, mean + (wide - mean) / number  # Welford's: no difference of large squares
            squares = squares + (wide - before) * (wide - mean)
            for name, head in heads.items():
                single = head(features).double()
                probabilities[name] = probabilities.get(name, 0) + single / passes
                expected[name] = expected.get(name, 0) + entropy_of(single) / passes
    found = {}
    for name, rows in probabilities.items():
        total = entropy_of(rows)
        parts = (rows, total, expected[name], (total - expected[name]).clamp_min(0))
        found[name] = Predictive(*(part.float().cpu() for part in parts))
    return found, mean, squares / (passes - 1)


def _joined(parts: list[Predictive]) -> Predictive:
    fields = ("probabilities", "entropy", "expected_entropy", "mutual_information")
    return Predictive(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Error among the k images that are least in doubt, for k = 1 … N; float64."""

    risk: Tensor  # [N]

    @property
    def area(self) -> float:
        """AURC in percent: the mean of the risks (Geifman et al., arXiv:1805.08206); random doubt gives the error."""
        return 100 * float(self.risk.mean())

    def accuracy_at(self, coverage: float) -> float:
        """Percent right of the ``coverage`` · N images, rounded up, that are least in doubt."""
        kept = max(1, math.ceil(coverage * len(self.risk) - 1e-9))
        return 100 * (1 - float(self.risk[kept - 1]))


def risk_coverage(doubt: Tensor, correct: Tensor) -> RiskCoverage:
    """Of doubts [N], the larger the less certain, and hits [N].

    Images of equal doubt come in no order: each counts as the mean of its equals, so that no accident of sorting
    decides.
    """
    values, group, counts = torch.unique(doubt.double(), return_inverse=True, return_counts=True)
    errors = torch.zeros_like(values).index_add_(0, group, 1 - correct.to(values))
    expected = (errors / counts).repeat_interleave(counts)  # of the image at each rank
    ranks = torch.arange(1, len(expected) + 1, device=expected.device)
    return RiskCoverage((expected.cumsum(0) / ranks).cpu())


def ood_scores(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """(AUROC, false positive rate at 95 % true positives), percent, of doubts [N] and [M].

    The data's own images are the positive class, told by low doubt (Hendrycks & Gimpel, arXiv:1610.02136; Liang et al.,
    arXiv:1706.02690): the second figure is the share of foreign images among which one would trust the network, if one
    trusts it for 95 % of its own.
    """
    doubt = torch.cat([inside, outside]).double().cpu()
    own = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    false, true, _ = roc_curve(own.numpy(), -doubt.numpy(), drop_intermediate=False)
    return 100 * float(roc_auc_score(own.numpy(), -doubt.numpy())), 100 * float(false[(true >= 0.95).argmax()])
