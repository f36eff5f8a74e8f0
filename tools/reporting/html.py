"""HTML in which nothing can be injected: every text is escaped unless it is markup that was made here."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_VOID = {"img", "br", "meta", "link"}
_HERE = Path(__file__).parent


class Html(str):
    """Finished markup, which is written as it is; any other text is escaped."""


Child = str | None | Iterable["str | None"]


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Html:
    """``<name attributes>children</name>``. ``class_`` is class, ``a_b`` is a-b; an attribute of None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Texts and markup one after the other; None is nothing."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, str):
            parts.append(child if isinstance(child, Html) else html.escape(child))
        elif child is not None:
            parts.append(join(child))
    return Html("".join(parts))


def note(*children: Child) -> Html:
    """Something that is missing, and why."""
    return tag("p", *children, class_="note")


def warning(*children: Child) -> Html:
    return tag("p", tag("strong", "Warning: "), *children, class_="warning")


def table(rows: Sequence[Sequence[Child]], header: Sequence[Child], *, marked: Iterable[int] = ()) -> Html:
    """The first cell of a row is its heading; ``marked`` rows stand out."""
    chosen = set(marked)
    head = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in header]))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            [tag("td", cell) for cell in row[1:]],
            class_="differs" if number in chosen else None,
        )
        for number, row in enumerate(rows)
    ]
    return tag("div", tag("table", head, tag("tbody", body)), class_="wide", tabindex=0)


def picture(data: bytes, kind: str, alt: str, **attributes: str | int | None) -> Html:
    """An <img> with its bytes inside. ``kind``: png or jpeg."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=source, alt=alt, **attributes)


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a page. ``guide`` tells a stranger what is seen, and what good and bad look like."""

    anchor: str
    title: str
    guide: str
    body: Html


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole document: no file and no host but itself, and a browser that is told to ask for none."""
    script = (_HERE / "page.js").read_text()
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    contents = tag("ol", [tag("li", tag("a", one.title, href=f"#{one.anchor}")) for one in sections])
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html((_HERE / "page.css").read_text())),
    )
    written = [
        tag("section", tag("h2", one.title), tag("p", one.guide, class_="guide"), one.body, id=one.anchor)
        for one in sections
    ]
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", subtitle)),
        tag(
            "div",
            tag("nav", tag("h2", "Contents"), contents, aria_label="Contents"),
            tag("main", written),
            class_="page",
        ),
        tag("div", id="tip", role="status", hidden=""),
        tag("script", Html(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"
