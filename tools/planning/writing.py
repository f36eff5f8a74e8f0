"""A plan as tables in Markdown, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from configs.recipe import Recipe
from tools.planning.estimate import PARTS, Cluster, Estimate, first_at, of_candidates
from tools.planning.model import Model
from tools.planning.rates import NAMES, known
from tools.planning.transfers import BATCHNORM, KINDS, WEIGHTS

_SHARES = (0.1, 0.5)  # of a step, worth a word
_WHAT = {"loss": "the loss's products with candidates take", "network": "the network takes"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    yield line(head)
    yield "|".join(["", *("-" * (w + 2) if n == 0 else "-" * (w + 1) + ":" for n, w in enumerate(widths)), ""])
    yield from (line(row) for row in rows)


def heading(recipe: Recipe, model: Model, cluster: Cluster, name: str) -> Iterator[str]:
    views = f"{model.views} views"
    yield (
        f"{name}: {recipe.method.name}, {recipe.encoder.arch}, {cluster.images:,} images, {views}, {recipe.epochs}"
        f" epochs, {'GPUs' if cluster.device == 'cuda' else 'CPUs'}"
    )
    yield (
        f"{model.parameters:,} parameters, {len(model.norms)} BatchNorms; forward and backward of an image with all"
        f" its views: {model.step_flops / 1e9:,.2f} GFLOP"
    )
    for rate in NAMES:
        if rate in cluster.rates:
            found = cluster.rates[rate]
            yield f"{rate}: {found.given:g} {NAMES[rate][0]} ({found.source})"
    if "latency" not in cluster.rates:
        yield "latency: not given, so collectives cost their bytes alone"


def run_table(estimates: Sequence[Estimate]) -> Iterator[str]:
    head = ["ranks", "nodes", "batch", "images a rank", "candidates", "steps an epoch", "steps", "hours"]
    rows = [
        [
            *(f"{one.share.ranks:,}", f"{one.nodes:,}", f"{one.share.batch:,}", f"{one.share.images:,}"),
            *(f"{one.candidates:,}", f"{one.steps_per_epoch:,}", f"{one.steps:,}"),
            "?" if one.hours is None else significant(one.hours),
        ]
        for one in estimates
    ]
    yield from table(head, rows)


def hours_table(hours: Mapping[float, Sequence[Estimate]]) -> Iterator[str]:
    """Hours of the run, by images/s that one rank trains alone."""
    rows = [
        [f"{speed:,g}", *("?" if one.hours is None else significant(one.hours) for one in estimates)]
        for speed, estimates in hours.items()
    ]
    yield from table(["hours, if a rank trains images/s", *_ranks(next(iter(hours.values())))], rows)


def traffic_table(estimates: Sequence[Estimate]) -> Iterator[str]:
    """What a rank sends in a step, by kind."""
    rows = [
        [kind, *(size(one.sent[kind]) for one in estimates)]
        for kind in KINDS
        if any(one.sent[kind] for one in estimates)
    ]
    rows.append(["all", *(size(sum(one.sent.values())) for one in estimates)])
    rows.append(["collectives", *(f"{one.calls if one.share.ranks > 1 else 0:,}" for one in estimates)])
    yield from table(["a rank sends in a step, and receives", *_ranks(estimates)], rows)


def memory_table(estimates: Sequence[Estimate], device: float | None) -> Iterator[str]:
    names = list(dict.fromkeys(name for one in estimates for name in one.held))
    rows = [[name, *(size(one.held.get(name, 0)) for one in estimates)] for name in names]
    if device is not None:
        rows.append(["share of the device", *(percent(sum(one.held.values()) / device) for one in estimates)])
    yield from table(["a rank holds, activations and views left out", *_ranks(estimates)], rows)


def compute_table(estimates: Sequence[Estimate]) -> Iterator[str]:
    rows = [
        ["encoder and heads, TFLOP", *(significant(one.encoder_flops / 1e12) for one in estimates)],
        ["loss, TFLOP", *(significant(one.loss_flops / 1e12) for one in estimates)],
        ["loss / encoder", *(percent(one.loss_flops / one.encoder_flops) for one in estimates)],
    ]
    for part in PARTS:
        rows.append([f"{part}, ms", *(_ms(one.seconds[part]) for one in estimates)])
    if any(one.seconds["loading"] for one in estimates):
        rows.append(["loading beside it, ms", *(_ms(one.seconds["loading"]) for one in estimates)])
    yield from table(["a rank computes in a step", *_ranks(estimates)], rows)


def storage(cluster: Cluster, image_bytes: float, shard_mb: int, estimates: Sequence[Estimate]) -> Iterator[str]:
    total = image_bytes * cluster.images
    shards = max(1, round(total / (shard_mb * 2**20)))
    yield (
        f"Storage: {cluster.images:,} images of {image_bytes:,.0f} bytes are {size(total)}: one .beton, or"
        f" {shards:,} shard{'s' if shards > 1 else ''} of {shard_mb} MiB."
    )
    for one in estimates:
        if one.step is not None:
            rate = one.share.images * min(one.share.ranks, cluster.a_node) / one.step
            yield (
                f"At {one.share.ranks:,} ranks {_each(one.nodes)} reads {rate:,.0f} images/s,"
                f" {size(rate * image_bytes)}/s."
            )


def words(estimates: Sequence[Estimate], all_ranks: Sequence[Estimate], cluster: Cluster) -> Iterator[str]:
    """What bounds the run, and from how many ranks on; ``all_ranks``: 1, 2, 4, …."""
    for one in estimates:
        yield _bound(one)
    most = all_ranks[-1].share.ranks
    for part, what in _WHAT.items():
        missing = next((one for one in all_ranks if one.part(part) is None), None)
        if missing is not None:
            continue
        found = [(least, first_at(all_ranks, part, least)) for least in _SHARES]
        reached = [f"{percent(least)} of a step from {_count(at, 'rank')} on" for least, at in found if at]
        highest = max(one.part(part) or 0.0 for one in all_ranks)
        if not reached:
            yield f"Up to {most:,} ranks {what} at most {percent(highest)} of a step."
        else:
            never = "" if found[-1][1] else f"; at most {percent(highest)} up to {most:,}"
            yield f"Of 1, 2, 4, … ranks, {what} {' and '.join(reached)}{never}."
    yield from _of_a_ring(estimates[-1], cluster)


def _bound(one: Estimate) -> str:
    at = f"{_count(one.share.ranks, 'rank')}:"
    if one.step is None:
        return f"{at} what bounds the run cannot be said without all rates of computing and network."
    loading = one.seconds["loading"]
    shares = ", ".join(f"{part} {percent(one.part(part) or 0.0)}" for part in PARTS)
    if loading and loading >= one.step:
        return f"{at} loading bounds the run: {significant(1e3 * loading)} ms a step, of which {shares}."
    largest = max(PARTS, key=lambda part: one.seconds[part] or 0.0)
    text = f"{at} the {largest} bounds the run; of a step {shares}."
    sent = sum(one.sent.values())
    if sent:
        kinds = sorted((WEIGHTS, BATCHNORM, "the rest"), key=lambda kind: -_sent(one, kind))
        text += " Of the bytes: " + ", ".join(f"{kind} {percent(_sent(one, kind) / sent)}" for kind in kinds) + "."
    return text


def _sent(one: Estimate, kind: str) -> float:
    if kind in one.sent:
        return one.sent[kind]
    return sum(size for name, size in one.sent.items() if name not in (WEIGHTS, BATCHNORM))


def _of_a_ring(one: Estimate, cluster: Cluster) -> Iterator[str]:
    """Whether candidates had better be passed around than gathered."""
    gathered = one.held.get("gathered candidates", 0)
    if not gathered or one.share.ranks == 1:
        return
    sent, all_sent = of_candidates(one), sum(one.sent.values())
    text = (
        f"Candidates at {one.share.ranks:,} ranks: {size(gathered)} gathered on each, for which a rank sends"
        f" {percent(sent / all_sent)} of its bytes."
    )
    device = known(cluster.rates, "device_memory")
    if device is not None:
        text += f" They are {percent(gathered / device)} of the device."
    loss = one.part("loss")
    if loss is not None:
        text += f" Passed around in a ring, at most the loss's own {percent(loss)} of the step could hide sending them."
    yield text


def _ranks(estimates: Sequence[Estimate]) -> list[str]:
    return [_count(one.share.ranks, "rank") for one in estimates]


def _each(nodes: int) -> str:
    return "the node" if nodes == 1 else f"each of {nodes:,} nodes"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else significant(1e3 * seconds)


def size(count: float) -> str:
    """Bytes, in units of 1,000."""
    for unit, at in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= at:
            return f"{significant(count / at)} {unit}"
    return f"{count:.0f} B"


def significant(number: float) -> str:
    """Three digits, without exponents where they can be done without."""
    if number == 0 or not 1e-3 <= abs(number) < 1e15:
        return f"{number:.3g}"
    digits = max(0, 2 - int(f"{number:e}".partition("e")[2]))
    text = f"{number:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    return f"{significant(100 * share)} %" if share >= 0.0001 or share == 0 else "below 0.01 %"
