"""The curves of ``metrics.jsonl``: all runs in the same chart, what belongs together in a row."""

from __future__ import annotations

from collections.abc import Sequence

from tools.reporting.charts import Line, line_chart, line_swatch
from tools.reporting.html import Html, Section, join, note, tag, warning
from tools.reporting.runs import RunFolder

GUIDE = (
    "How training went, over epochs. Healthy: the loss falls quickly and then slowly, held-out accuracy rises, and "
    "feature_std and effective_rank stay far from the bottom of their charts. Losses compare only between runs of the "
    "same method, temperature and batch size, accuracies between all on the same data. Point at a chart for values."
)

ACCURACY, COLLAPSE, TRAINING, OWN, SPEED = (
    "What the representation is worth, on the held-out part of the training images",
    "Signs of collapse",
    "Loss and learning rate",
    "The method's own figures",
    "Speed",
)
_TOLD = {
    "train/loss": "Of training batches. Flat from the start: learning rate too low or far too high.",
    "train/lr": "Of each step: warm-up, then the schedule.",
    "train/probe_loss": "Cross-entropy of a linear classifier trained beside the encoder. It should fall.",
    "holdout/probe": "Accuracy in % of that classifier on held-out images. It learns along, so it lags behind kNN.",
    "holdout/feature_std": "0: all images have the same features, a collapse. 1: spread evenly over the sphere.",
    "holdout/effective_rank": "How many directions the features use. Close to 1, or falling on and on: collapse.",
    "train/contrastive_accuracy": "Share of views that find their partner. Should rise; near 1 early: too easy a task.",
    "train/positive_similarity": "Mean cosine of two views of an image, after the projector. Should rise.",
    "train/negative_similarity": "Mean cosine of views of different images. Near 0: good; that of positives: collapse.",
    "train/queue_filled": "Share of the queue of past projections that is filled; it is used once full.",
    "train/neighbour_similarity": "Mean cosine between an image and the neighbour that attracts it.",
    "train/neighbour_age": "How many steps ago the attracting neighbours were put into the queue.",
    "train/neighbour_same_class": "Share of neighbours that are of the image's class. Labels are watched, not used.",
    "train/mine/mutual_information": "MINE's estimate, in nats, of what two views' features tell about each other.",
    "train/embedding_std": "Mean standard deviation of the embedding's dimensions. Near 0 is collapse.",
    "time/images_per_second": "Of training alone, without evaluation and checkpoints.",
    "time/data_wait": "Share of the time that the host waited for images; a GPU may have been busy. Near 0 is good.",
}


def curves(runs: Sequence[RunFolder]) -> Section:
    """One chart a key, in groups; a key that only some runs have shows those."""
    parts: list[Html] = [_broken(run, key, step) for run in runs for key, step in run.broken.items()]
    keys = list(dict.fromkeys(key for run in runs for key in run.curves))
    if not keys:
        parts.append(note("No curves yet: nothing was logged."))
    elif len(runs) > 1:
        parts.append(run_legend(runs))
    for group in (TRAINING, ACCURACY, COLLAPSE, OWN, SPEED):
        chosen = [key for key in keys if _group(key) == group]
        if group == TRAINING:
            chosen.sort(key=lambda key: key != "train/loss")
        if chosen:
            parts += [tag("h3", group), tag("div", [_chart(runs, key) for key in chosen], class_="grid-of-charts")]
        elif keys and group in (ACCURACY, COLLAPSE):
            parts += [tag("h3", group), note("None logged: no held-out part was scored (yet).")]
    return Section("curves", "Curves", GUIDE, join(parts))


def run_legend(runs: Sequence[RunFolder]) -> Html:
    """Which line is which run's."""
    return tag("ul", [tag("li", line_swatch(run.number), run.name) for run in runs], class_="legend")


def _chart(runs: Sequence[RunFolder], key: str) -> Html:
    lines = [
        Line(run.name, run.number, [point.epoch for point in points], [point.value for point in points])
        for run in runs
        if (points := run.curves.get(key))
    ]
    last = "  ·  ".join(f"{line.y[-1]:.4g}" if len(runs) == 1 else f"{line.name} {line.y[-1]:.4g}" for line in lines)
    caption = tag(
        "figcaption", tag("h4", _title(key)), tag("p", _explained(key), tag("br"), f"Last: {last}", class_="small")
    )
    return tag("figure", caption, line_chart(lines, title=key, x_label="epoch", from_zero=_from_zero(key)))


def _from_zero(key: str) -> bool:
    """Whether a chart must show how far above 0 its values are."""
    return key in ("train/lr", "time/images_per_second", "time/data_wait") or _group(key) == COLLAPSE


def _group(key: str) -> str:
    if key in ("train/loss", "train/lr"):
        return TRAINING
    if key in ("holdout/feature_std", "holdout/effective_rank", "train/embedding_std"):
        return COLLAPSE
    if key.startswith("holdout/") or key == "train/probe_loss":
        return ACCURACY
    return SPEED if key.startswith("time/") else OWN


def _title(key: str) -> str:
    known = {
        "train/loss": "Loss",
        "train/lr": "Learning rate",
        "train/probe_loss": "Online linear probe: loss",
        "holdout/probe": "Online linear probe: held-out accuracy (%)",
        "holdout/feature_std": "feature_std",
        "holdout/effective_rank": "effective_rank",
        "time/images_per_second": "Images per second",
        "time/data_wait": "Waiting for data",
    }
    if key.startswith("holdout/knn_k"):
        k, _, temperature = key.removeprefix("holdout/knn_k").partition("_t")
        return f"kNN held-out accuracy (%), k = {k}, T = {temperature}"
    return known.get(key, key.removeprefix("train/"))


def _explained(key: str) -> str:
    if key.startswith("holdout/knn_"):
        return (
            "Images classified by the most similar training images. Rising is learning; compare with a random encoder."
        )
    return _TOLD.get(key, f"{key}, as the method logs it.")


def _broken(run: RunFolder, key: str, step: int) -> Html:
    return warning(f"{run.name}: {key} was NaN or infinite at step {step}. A loss that is not finite has diverged.")
