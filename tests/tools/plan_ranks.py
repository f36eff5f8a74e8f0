"""What real ranks send in a step of each method, for the plan to be held against."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from configs.recipe import Recipe
from kernels import bregman_loss, distance_correlation, ntxent
from kernels.ranks import exchange_parts, gather_rows
from pipelines.views import View
from tests.trainers.small_runs import BATCH, SmallEncoder, SmallRun, facts
from tools.planning.methods import loss_cost
from tools.planning.model import look_at
from tools.planning.recording import recorded
from tools.planning.transfers import Share, engine_transfers, monitor_transfers
from trainers.methods import BaseMethod, MethodConfig, build_method, find_method
from trainers.mine import Mine
from trainers.monitors import Probe

Sent = dict[tuple[str, int], int]  # how often a collective of so many bytes is called in a step
STEADY = 2  # the step that is compared: queues and centres are full
PLANS = {
    "mvmr": (View(crop="center"), View(crop="random_resized")),
    "clipdistill": (View(crop="center"), View(crop="random_resized")),
}


def make(case: dict[str, Any]) -> tuple[BaseMethod, MethodConfig, Any]:
    name = case["name"]
    torch.manual_seed(0)
    config = find_method(name).Config.model_validate({"name": name, **case.get("settings", {})})
    plan = PLANS.get(name, (View(crop="random_resized"),) * case.get("views", 2))
    # Few images, so that a teacher's outputs are all remembered when the step comes that is compared.
    known = facts(plan=plan, classes=3, steady=True)
    return build_method(config, SmallEncoder(), known), config, known


def recipe_of(case: dict[str, Any], config: MethodConfig) -> Recipe:
    engine = dict(case.get("engine", {}))
    settings = {
        "accumulation": engine.get("accumulation", 1),
        "batchnorm": engine.get("batchnorm", "sync"),
        "zero_stage": engine.get("zero_stage", 0),
        "gradient_clipping": engine.get("clipping", 0.0),
    }
    return Recipe.model_validate(
        {"batch_size": BATCH, "method": config, "engine": settings, "monitor": {"mine": case.get("mine", False)}}
    )


def planned(case: dict[str, Any], ranks: int) -> Sent:
    """What the plan says."""
    method, config, known = make(case)
    model, recipe = look_at(method, config, known), recipe_of(case, config)
    share = Share(ranks, BATCH // ranks, "cpu", False)
    transfers = loss_cost(share, model).transfers
    transfers = transfers + engine_transfers(share, model, recipe) + monitor_transfers(share, model, recipe)
    sent: Counter[tuple[str, int]] = Counter()
    for transfer in transfers:
        sent[transfer.collective, transfer.size] += transfer.times
    return dict(sent)


def sent(group: dist.ProcessGroup, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What each case sends; inside `run_ranks`. And what comes of two ways to add up the columns of all ranks."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    local = torch.randn(world * 5, generator=torch.Generator().manual_seed(rank))
    sums = {
        "exchanged": exchange_parts(local, group).logsumexp(0).tolist(),
        "gathered": gather_rows(local[None], group).logsumexp(0)[5 * rank : 5 * rank + 5].tolist(),
    }
    with recorded() as calls:
        return sums | {name: _sent(group, case, calls) for name, case in cases.items()}


def _sent(group: dist.ProcessGroup, case: dict[str, Any], calls: list[Any]) -> Sent:
    method, _, known = make(case)
    run, views = SmallRun(group, method, **case.get("engine", {})), case.get("views", 2)
    device = torch.device("cpu")
    probe = Probe(SmallEncoder.features, known.classes, 1e-3, device)
    mine = Mine(SmallEncoder.features, device) if case.get("mine") else None
    for step in range(STEADY + 1):
        calls.clear()
        result = run.step(step, views)
        features = result.embeddings["features"]
        probe.fit(features, result.batch.labels, group)
        if mine is not None:
            mine.fit(features[0], features[1], group)
        run.ranks.highest(False, False, False)  # as trainers.pretrain, in every step
    return dict(Counter((call.name, call.size) for call in calls))


def sent_by_triton(group: dist.ProcessGroup) -> dict[str, list[tuple[str, int]]]:
    """What the kernels of GPUs send, by Triton's interpreter; inside `run_ranks`."""
    import tests.interpreter  # noqa: F401

    found = {}
    torch.manual_seed(dist.get_rank(group))
    with recorded() as calls:
        for name, dtype in (("ntxent half", torch.bfloat16), ("ntxent float", torch.float32)):
            z1, z2 = (torch.randn(12, 16).to(dtype).requires_grad_() for _ in range(2))
            calls.clear()
            ntxent(z1, z2, temperature=0.5, group=group, backend="triton").backward()
            found[name] = [(call.name, call.size) for call in calls]
        scores = [torch.randn(12, 5, requires_grad=True) for _ in range(2)]
        calls.clear()
        weights = (scores[0].softmax(1), scores[1].softmax(1))
        bregman_loss(*scores, temperature=0.5, weights=weights, group=group, backend="triton").backward()
        found["bregman"] = [(call.name, call.size) for call in calls]
        x, z = torch.randn(12, 7), torch.randn(12, 16, requires_grad=True)
        calls.clear()
        distance_correlation(x, z, group=group, backend="triton").backward()
        found["distance"] = [(call.name, call.size) for call in calls]
    return found
