"""What was written down: the runs at a glance, their recipes, their evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.recipe import RecipeError
from pipelines.sources import DataError
from tools.reporting.html import Html, Section, join, note, picture, table, tag, warning
from tools.reporting.runs import Record, RunFolder
from trainers.optim import OptimConfig

COLLAPSED_STD, COLLAPSED_RANK = 0.1, 1.5
_HEADLINES = {
    "method": "method.name",
    "encoder": "encoder.arch",
    "data": "data.source",
    "training images at most": "data.limit",
    "views": "views.plan",
    "view size (pixels)": "views.size",
    "batch size": "batch_size",
    "epochs": "epochs",
    "optimizer": "optim.name",
    "learning rate (optim.lr)": "optim.lr",
    "weight decay": "optim.weight_decay",
    "schedule": "schedule.name",
    "warm-up epochs": "schedule.warmup_epochs",
    "seed": "seed",
}


def overview(runs: Sequence[RunFolder]) -> Section:
    """The last value of what matters, and all that is wrong."""
    guide = (
        "The last figures of each run, on held-out training images; rows that begin with test are the results of "
        f"evaluate.py. A feature_std below {COLLAPSED_STD} means that the encoder gives all images nearly the same "
        "features: the run has collapsed."
    )
    parts = [warning(f"{run.name}: {text}") for run in runs for text in _alarms(run)]
    parts += [note(f"{run.name}: {text}.") for run in runs for text in run.problems]
    found = [_figures(run) for run in runs]
    names = list(dict.fromkeys(name for figures in found for name in figures))
    rows = [[name, *(figures.get(name, "–") for figures in found)] for name in names]
    return Section("overview", "At a glance", guide, join([*parts, table(rows, ["", *_names(runs)])]))


def recipes(runs: Sequence[RunFolder]) -> Section:
    """The settings that are asked about first, all that differ, and all there are."""
    several = len(runs) > 1
    guide = "What was trained, and how. Every other setting is in the list below the table."
    if several:
        guide = (
            "What was trained, and how. Marked rows (≠) differ between the runs: only where a single thing differs "
            "is it the cause of a different result."
        )
    rows: list[list[str]] = [[name, *(_setting(run.get(key)) for run in runs)] for name, key in _HEADLINES.items()]
    peak = [_peak_lr(run) for run in runs]
    place = list(_HEADLINES).index("learning rate (optim.lr)") + 1
    rows.insert(place, ["peak learning rate, after lr_scaling", *peak])
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    every = [dict(_flat(run.recipe)) for run in runs]
    keys = list(dict.fromkeys(key for settings in every for key in settings))
    full = [[key, *(_setting(settings.get(key)) for settings in every)] for key in keys]
    parts = [table(rows, ["", *_names(runs)], marked=_differing(rows))]
    if several:
        differing = [full[number] for number in _differing(full)]
        summary = tag("summary", f"All {len(differing)} settings that differ")
        parts.append(tag("details", summary, table(differing, ["setting", *_names(runs)]), open=""))
    every_setting = table(full, ["setting", *_names(runs)], marked=_differing(full))
    parts.append(tag("details", tag("summary", f"All {len(full)} settings"), every_setting))
    return Section("recipe", "Recipes" if several else "Recipe", guide, join(parts))


def evaluations(runs: Sequence[RunFolder]) -> Section:
    """Every record with its protocol; of several runs the same protocols in a row."""
    guide = (
        "What evaluate.py measured on test images, with the protocol that a number must be read with. The bracket is a "
        "95 % interval over test images: of two runs, believe a difference only if it is larger than the brackets, and "
        "remember that another seed moves results as well."
    )
    parts: list[Html] = []
    if not any(run.records for run in runs):
        parts.append(note("No evaluations yet. For one: ", tag("code", f"python evaluate.py knn {runs[0].path}")))
    elif len(runs) > 1:
        parts += _side_by_side(runs)
    for run in runs:
        if run.records:
            if len(runs) > 1:
                parts.append(tag("h3", run.name))
            shown = [_record(record, pictures_open=len(runs) == 1) for record in run.records]
            parts.append(tag("div", shown, class_="side"))
    return Section("evaluations", "Evaluations", guide, join(parts))


def _figures(run: RunFolder) -> dict[str, str]:
    total = run.get("epochs")
    figures = {"state": _state(run), "method": _shown(run.get("method.name")), "data": _shown(run.get("data.source"))}
    if run.last is not None:
        figures["trained"] = f"epoch {run.last[1]:.4g} of {_shown(total)} (step {run.last[0]:,})"
    if points := run.curves.get("train/loss"):
        figures["loss, first to last"] = f"{points[0].value:.4g} → {points[-1].value:.4g}"
    for key in run.curves:
        if key.startswith("holdout/knn_k"):
            k, _, temperature = key.removeprefix("holdout/knn_k").partition("_t")
            figures[f"held-out kNN, k = {k}, T = {temperature} (%)"] = f"{run.curves[key][-1].value:.2f}"
    for name, key in {
        "held-out linear probe (%)": "holdout/probe",
        "feature_std": "holdout/feature_std",
        "effective_rank": "holdout/effective_rank",
    }.items():
        if points := run.curves.get(key):
            figures[name] = f"{points[-1].value:.4g}"
    for record in run.records:
        figures[f"test: {record.title}, {_metric(record)}"] = _value(record)
    return figures


def _state(run: RunFolder) -> str:
    if (run.path / "encoder.safetensors").exists():
        return "finished"
    if any((run.path / "checkpoints").glob("step-*")):
        return "training or stopped; checkpoints are there"
    return "training or stopped; no checkpoint yet"


def _alarms(run: RunFolder) -> Iterator[str]:
    std, rank = (run.curves.get(f"holdout/{key}") for key in ("feature_std", "effective_rank"))
    if std and std[-1].value < COLLAPSED_STD:
        yield f"feature_std ended at {std[-1].value:.3g}: all images have nearly the same features, a collapse."
    if rank and rank[-1].value < COLLAPSED_RANK:
        yield f"effective_rank ended at {rank[-1].value:.3g}: the features lie on a line, a collapse."


def _side_by_side(runs: Sequence[RunFolder]) -> list[Html]:
    titles = sorted({record.title for run in runs for record in run.records})
    rows = []
    for title in titles:
        found = [[record for record in run.records if record.title == title] for run in runs]
        metrics = sorted({_metric(record) for records in found for record in records})
        cells = [[tag("div", _value(record)) for record in records] or "–" for records in found]
        told = {str(record.values.get("description")) for records in found for record in records}
        remark = tag("div", "protocols differ, see below", class_="small") if len(told) > 1 else None
        rows.append([[f"{title}: {', '.join(metrics)}", remark], *cells])
    return [tag("h3", "Side by side"), table(rows, ["protocol and metric", *_names(runs)])]


def _record(record: Record, *, pictures_open: bool) -> Html:
    values = record.values
    scored = f", {values['n_test']:,} test images" if isinstance(values.get("n_test"), int) else ""
    parts: list[Html | None] = [
        tag("h4", record.title),
        tag("p", tag("span", f"{_metric(record)}: {_value(record)}", class_="value"), scored),
        tag("p", f"Protocol: {values.get('description', 'not recorded')}", class_="small"),
        tag("p", f"Encoder: {values['encoder']}", class_="small") if "encoder" in values else None,
    ]
    parts += [warning(str(text)) for text in _listed(values.get("warnings"))]
    rows = [row for row in _listed(values.get("table")) if isinstance(row, dict)]
    if rows:
        columns = list(dict.fromkeys(str(key) for row in rows for key in row))
        parts.append(table([[_shown(row.get(key)) for key in columns] for row in rows], columns))
    pictures = values.get("pictures")
    for name, file in pictures.items() if isinstance(pictures, dict) else ():
        parts.append(_picture(record, str(name), str(file), pictures_open))
    return tag("article", parts, class_="results")


def _picture(record: Record, name: str, file: str, is_open: bool) -> Html:
    path = record.path.parent / file
    if path.name != file or path.suffix != ".png":
        return note(f"The picture {name!r} is left out: {file!r} is not a PNG file beside the record.")
    try:
        data = path.read_bytes()
    except OSError:
        return note(f"The picture {name!r} ({file}) is no longer there.")
    shown = tag("figure", picture(data, "png", f"{name}: {record.title}", loading="lazy"))
    return tag("details", tag("summary", f"Picture: {name}"), shown, open="" if is_open else None)


def _metric(record: Record) -> str:
    name = str(record.values["metric"])
    return {"top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)"}.get(name, name)


def _value(record: Record) -> str:
    low, high = (record.values.get(f"interval_{side}") for side in ("low", "high"))
    interval = f" [{_shown(low)}, {_shown(high)}]" if low is not None and high is not None else ""
    return f"{_shown(record.values['value'])}{interval}"


def _peak_lr(run: RunFolder) -> str:
    optim, batch = run.get("optim"), run.get("batch_size")
    try:
        return f"{OptimConfig.model_validate(optim or {}).scaled_lr(batch):.4g}"
    except (ValueError, TypeError, RecipeError, DataError):
        return "–"


def _names(runs: Sequence[RunFolder]) -> list[str]:
    return [run.name for run in runs]


def _differing(rows: Sequence[Sequence[Any]]) -> list[int]:
    return [number for number, row in enumerate(rows) if len({str(cell) for cell in row[1:]}) > 1]


def _flat(settings: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        inner = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict) and value:
            yield from _flat(value, inner)
        else:
            yield inner, value


def _setting(value: object) -> str:
    return "–" if value is None else str(value)


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if 10 <= abs(value) < 1e6 else f"{value:.4g}"
    return str(value)


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
