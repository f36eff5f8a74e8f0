"""The sections that need the data, and mostly the encoder: views, neighbours, similarities, maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.recipe import RecipeError
from pipelines.sources import DataError, Source, open_source
from tools.reporting import samples
from tools.reporting.charts import COLOURS, SHAPES, cosine_histogram, line_swatch, point_swatch, scatter
from tools.reporting.html import Html, Section, join, note, picture, table, tag, warning
from tools.reporting.runs import RunFolder
from trainers.features import FrozenEncoder, load_encoder
from trainers.state import CheckpointError

IMAGES_SHOWN, WRONG_SHOWN, VIEWS_SHOWN, NEIGHBOURS = 8, 4, 8, 6
MOST_CLASSES = 24  # with colours and shapes of their own
_SMALL = 64  # pixels: larger pictures are stored as JPEG

GUIDES = {
    "views": (
        "Drawn views",
        "What the encoder is shown: each row is an image and the views that this run's own recipe drew of it. In good "
        "views you would still recognise the object, yet no two are alike. Views that show nothing of it, or that "
        "hardly differ, teach little.",
    ),
    "neighbours": (
        "Nearest neighbours",
        "The images whose features are most similar to those of the image on the left. ✓ and a solid frame: of the "
        "same class; ✗ and a dashed frame: of another. A good encoder finds the same thing in another pose and colour; "
        "a poor one finds the same background or brightness.",
    ),
    "similarities": (
        "Similarities of pairs",
        "Cosine similarity of the encoder's features (before the projector): of two augmented views of the same image "
        "(positive), and of views of different images (negative). Good: two hills well apart, positives on the right. "
        "Bad: both on top of each other. Both in one spike at 1 is collapse.",
    ),
    "maps": (
        "Maps of the features",
        "Each point is an image, placed by its features alone; colour and shape are its class, added afterwards. Good: "
        "classes form islands. Bad: one cloud of mixed colours. The distances between islands and their sizes mean "
        "nothing, and UMAP and t-SNE each show some islands of their own making.",
    ),
}


def look(run: RunFolder, limit: int, device: torch.device, say: Callable[[str], None]) -> dict[str, Html]:
    """A run's part of each section, by its anchor; where one cannot be had, why."""
    parts: dict[str, Html] = {}
    say(f"{run.name}: views")
    parts["views"] = _or_note(lambda: _gallery(run, device))
    try:
        say(f"{run.name}: features")
        encoder = load_encoder(run.path)
        sample = samples.choose_sample(run.data, limit)
        bank, queries = (
            samples.unit_features(encoder, source, run.data, device) for source in (sample.bank, sample.queries)
        )
    except (CheckpointError, DataError, RecipeError) as error:
        missing = note(f"Not shown: {error}.")
        return parts | dict.fromkeys(("neighbours", "similarities", "maps"), missing)
    parts["neighbours"] = _or_note(lambda: _neighbours(run, encoder, sample, queries, bank, device))
    say(f"{run.name}: similarities")
    parts["similarities"] = _or_note(lambda: _similarities(run, encoder, sample, device))
    say(f"{run.name}: maps")
    parts["maps"] = _or_note(lambda: _maps(encoder, sample, queries))
    return parts


def picture_sections(runs: Sequence[RunFolder], looked: Sequence[dict[str, Html]]) -> list[Section]:
    """The sections, the runs one after the other in each."""
    sections = []
    for anchor, (title, guide) in GUIDES.items():
        shown = [
            tag("div", tag("h3", run.name) if len(runs) > 1 else None, one[anchor])
            for run, one in zip(runs, looked, strict=True)
        ]
        sections.append(Section(anchor, title, guide, tag("div", shown, class_="side")))
    return sections


def _or_note(make: Callable[[], Html]) -> Html:
    try:
        return make()
    except (CheckpointError, DataError, RecipeError) as error:
        return note(f"Not shown: {error}.")


def _gallery(run: RunFolder, device: torch.device) -> Html:
    source, plan = open_source(run.data, "pretrain"), run.views.resolve()
    size = run.views.size or source.image_size
    positions = samples.spread_places(len(source), IMAGES_SHOWN)
    drawn: list[np.ndarray] = []  # [n, S, S, 3] of each view
    header = ["image"]
    for epoch in range(2 if 2 * len(plan) <= VIEWS_SHOWN else 1):
        where: dict[str, Any] = {
            "size": size,
            "seed": run.seed,
            "epoch": epoch,
            "config": run.data,
            "device": device,
        }
        views = samples.drawn_views(source, plan, positions, **where)[:VIEWS_SHOWN]
        drawn += list(samples.to_pixels(views, source))
        header += [f"epoch {epoch + 1}, view {number + 1}" for number in range(len(views))]
    chosen = source.select(positions)
    plain = samples.plain_images(chosen, size, run.data, device)
    rows = []
    for place, label in enumerate(_label_texts(chosen)):
        first = _figure(plain[place], f"image {place + 1}, {label}", label)
        rows.append(
            [
                first,
                *(
                    _figure(of[place], f"{name} of image {place + 1}")
                    for name, of in zip(header[1:], drawn, strict=True)
                ),
            ]
        )
    named = f"plan {run.views.plan}" if run.views.custom is None else "a plan of the recipe's own"
    remark = f"{size} × {size} pixels, {named}."
    if len(plan) > VIEWS_SHOWN:
        remark += f" {VIEWS_SHOWN} of the {len(plan)} views are shown."
    remark += " On the left the image as evaluation cuts it, with its class."
    return join([tag("p", remark, class_="small"), _sheet(rows, header)])


def _neighbours(
    run: RunFolder, encoder: FrozenEncoder, sample: samples.Sample, queries: Tensor, bank: Tensor, device: torch.device
) -> Html:
    cosines, places = samples.neighbours(queries, bank, NEIGHBOURS)
    right = samples.same_class(sample.queries.labels, sample.bank.labels[places]) if sample.labelled else None

    def rows_of(shown: Tensor) -> Html:
        asked, found = sample.queries.select(shown), sample.bank.select(places[shown].flatten())
        images = [samples.plain_images(source, encoder.image_size, run.data, device) for source in (asked, found)]
        names, found_names = _label_texts(asked), _label_texts(found)
        rows = []
        for row, query in enumerate(shown.tolist()):
            cells = [_figure(images[0][row], f"image, {names[row]}", names[row])]
            for column in range(places.shape[1]):
                at = row * places.shape[1] + column
                mark = None if right is None else bool(right[query, column])
                similarity = f"{cosines[query, column]:.2f}"
                cells.append(_figure(images[1][at], f"neighbour, {found_names[at]}", found_names[at], mark, similarity))
            rows.append(cells)
        header = ["image", *(f"{place + 1}." for place in range(places.shape[1]))]
        return _sheet(rows, header)

    remark = (
        f"Images: {len(queries):,} of {sample.told}. Searched: {len(bank):,} other training images. Below each its"
        " class and its cosine similarity."
    )
    if right is None:
        return join([tag("p", remark, class_="small"), rows_of(samples.spread_places(len(queries), IMAGES_SHOWN))])
    chance = samples.chance_of_same_class(sample.queries.labels, sample.bank.labels)
    remark += (
        f" Of the {places.shape[1]} nearest of each, {100 * float(right.float().mean()):.1f} % are of the same class;"
        f" drawn at random {100 * chance:.1f} % would be."
    )
    parts = [tag("p", remark, class_="small"), rows_of(samples.of_many_classes(sample.queries, IMAGES_SHOWN))]
    wrong = samples.most_wrong(right, WRONG_SHOWN)
    if len(wrong):
        parts += [tag("h4", "Where the encoder errs most"), rows_of(wrong)]
    return join(parts)


def _similarities(run: RunFolder, encoder: FrozenEncoder, sample: samples.Sample, device: torch.device) -> Html:
    plan = run.views.resolve()
    seed = run.seed
    positives, negatives = samples.pair_cosines(encoder, sample.queries, plan, run.data, device, seed)
    if not (np.isfinite(positives).all() and np.isfinite(negatives).all()):
        return note("Not shown: the features are not finite.")
    groups = [("positive pairs", positives), ("negative pairs", negatives)]
    chart = cosine_histogram(
        groups, title="cosine similarity", x_label="cosine similarity (height: share of the pairs)"
    )
    legend = tag(
        "ul",
        [
            tag("li", line_swatch(number, number), f"{name}: mean {values.mean():.3f}, {len(values):,} pairs")
            for number, (name, values) in enumerate(groups)
        ],
        class_="legend",
    )
    order = samples.probability_of_order(positives, negatives)
    remark = (
        f"A positive pair is more similar than a negative one in {100 * order:.1f} % of all comparisons (50 %: chance)."
        f" {len(positives)} images of {sample.told}. Features behind a ReLU are never negative, so that all their"
        " cosines are above 0: only the distance of the two hills counts."
    )
    spike = warning("positive and negative pairs are all alike: collapse.") if negatives.min() > 0.999 else None
    return join([spike, legend, chart, tag("p", remark, class_="small")])


def _maps(encoder: FrozenEncoder, sample: samples.Sample, features: Tensor) -> Html:
    if reason := samples.why_no_map(features):
        return note(f"Not shown: {reason}.")
    groups, remark = class_groups(sample)
    legend = tag("ul", [tag("li", point_swatch(number), name) for name, _, number in groups], class_="legend")
    parts = [tag("p", f"{len(features):,} images of {sample.told}. {remark}", class_="small"), legend]
    umap = samples.umap_map(features)
    if umap is None:
        parts.append(
            note("UMAP is left out: umap-learn is not installed. ", tag("code", "pip install twinstream[maps]"))
        )
    charts = []
    for name, places in (("UMAP", umap), ("t-SNE", samples.tsne_map(features))):
        if places is not None:
            chart = scatter(places, groups, title=f"{name} of {len(features)} images, {encoder.label}")
            charts.append(tag("figure", tag("figcaption", tag("h4", name)), chart))
    return join([*parts, tag("div", charts, class_="side")])


def class_groups(sample: samples.Sample) -> tuple[list[tuple[str, np.ndarray, int | None]], str]:
    """(name, places, number of its colour and shape) of each class that is told apart, grey ones first; a remark."""
    source = sample.queries
    if not sample.labelled:
        return [("images", np.arange(len(source)), 0)], "There are no labels to colour by."
    labels, remark = source.labels, ""
    if source.multi_label:
        present = labels == 1
        labels = torch.where(present.sum(1) == 1, present.float().argmax(1), -1)
        remark = "Only images of a single class are coloured. "
    counts = torch.bincount(labels[labels >= 0], minlength=source.num_classes)
    there = (counts > 0).nonzero()[:, 0].tolist()
    chosen = there
    if len(there) > MOST_CLASSES:
        chosen = sorted(sorted(there, key=lambda one: (-int(counts[one]), one))[:MOST_CLASSES])
        remark += f"The {MOST_CLASSES} most frequent of {len(there)} classes have colours, all others are grey."
    rest = ~torch.isin(labels, torch.tensor(chosen, dtype=labels.dtype))
    groups: list[tuple[str, np.ndarray, int | None]] = []
    if rest.any():
        groups.append(("other images", rest.nonzero()[:, 0].numpy(), None))
    for number, one in enumerate(chosen):
        groups.append((source.classes[one], (labels == one).nonzero()[:, 0].numpy(), number))
    return groups, remark


def _sheet(rows: list[list[Html]], header: list[str]) -> Html:
    """A table of pictures that shrink with the page."""
    return tag("div", table(rows, header), class_="sheet", style=f"max-width: {6.6 * len(header):.1f}rem")


def _label_texts(source: Source) -> list[str]:
    """A text for each image: its class, its classes, or nothing where there are no labels."""
    if source.multi_label:
        rows = [(row == 1).nonzero()[:, 0].tolist() for row in source.labels]
        return [", ".join(source.classes[one] for one in row) or "no class" for row in rows]
    return [source.classes[one] if one >= 0 else "" for one in source.labels.tolist()]


def _figure(pixels: np.ndarray, alt: str, caption: str = "", right: bool | None = None, below: str = "") -> Html:
    """[S, S, 3] uint8 with its caption, whether it is of the right class, and what else is to be said."""
    buffer = BytesIO()
    small = pixels.shape[0] <= _SMALL
    kind = "png" if small else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, **({} if small else {"quality": 85}))
    told = {None: "", True: "; the same class", False: "; another class"}[right]
    shown = picture(buffer.getvalue(), kind, alt.rstrip(", ") + told, class_="pixelated" if small else None)
    mark = None if right is None else tag("span", "✓ " if right else "✗ ", class_="mark")
    under = tag("figcaption", mark, caption, tag("div", below) if below else None) if caption or below else None
    return tag("figure", shown, under, class_={None: None, True: "right", False: "wrong"}[right])


assert MOST_CLASSES == COLOURS * SHAPES
