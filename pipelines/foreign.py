"""Text that somebody else wrote, read within bounds: never a pipe, never more than so many bytes, never a bomb.

The readers raise what the callers of `open`, `json` and `yaml` catch anyway: OSError, ValueError, yaml.YAMLError.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

MOST_RECIPE = 1 << 18  # bytes of a recipe
MOST_TEXT = 1 << 28  # bytes of other text, such as the annotations of a million images
MOST_NODES = 100_000  # values in a YAML file, each counted as often as aliases repeat it
MOST_LEVELS = 50  # lists and mappings inside each other
MOST_MESSAGE = 4_000  # letters; the names of ten files of the greatest length
MOST_DIGITS = 400  # letters of a number; the largest float has 309 digits

# What moves a terminal's cursor, ends a line, turns text around, or cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNPRINTABLE_BUT_NEWLINES = re.compile(f"(?!\n){_UNPRINTABLE.pattern}")


def printable(text: str, *, lines: bool = False) -> str:
    """With control characters, such as names of files may hold, as escapes; `lines`: newlines stay.

    What libraries say may quote a whole file: the middle of a long text is left out.
    """
    pattern = _UNPRINTABLE_BUT_NEWLINES if lines else _UNPRINTABLE
    text = pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if len(text) <= MOST_MESSAGE else f"{text[: MOST_MESSAGE - 500]} ... {text[-490:]}"


def shortened(value: object, most: int = 200) -> str:
    """`repr` of a value for an error's message, cut; nothing longer is built on the way."""
    if isinstance(value, int) and value.bit_length() > 4 * most:
        return "a number of very many digits"
    if isinstance(value, list | tuple | dict | set) and _count(value, most, MOST_LEVELS) > most:
        return f"a {type(value).__name__} of very many values"
    text = repr(value[: most + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= most else text[:most] + " ..."


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError for pipes, sockets and devices: opening one may wait for ever, reading one may not end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")


def read_text(path: Path, most: int = MOST_TEXT, errors: str = "strict") -> str:
    """A text file in UTF-8.

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8", errors).replace("\r\n", "\n")


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file.

    Raises:
        OSError: it cannot be read, is no regular file, or has more than `most` bytes.
    """
    # A pipe without a writer would be waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"{path} has more than {most:,} bytes")
    return data


def load_json(text: str | bytes) -> Any:
    """`json.loads`, whose complaints are all ValueErrors."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists within lists, too many levels") from error


def load_yaml(text: str) -> Any:
    """`yaml.safe_load` of a small text, whose complaints are all yaml.YAMLErrors.

    Aliases (`*name`) may repeat what they name, but not until there are more than MOST_NODES values, and nothing may
    hold itself. No text may hold a NUL, which no path and no argument of a program can.

    Raises:
        yaml.YAMLError: not YAML, a value of a tag that does not fit it, or beyond these bounds.
    """
    if len(text) > MOST_RECIPE:
        raise yaml.YAMLError(f"more than {MOST_RECIPE:,} letters")
    loader = None
    try:
        # Refused before it is parsed by functions that call each other.
        depth = most = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            most = max(most, depth)
            if most > MOST_LEVELS:
                raise yaml.YAMLError(f"more than {MOST_LEVELS} lists and mappings inside each other")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _nodes(node, {}) > MOST_NODES:
            raise yaml.YAMLError(f"more than {MOST_NODES:,} values, with those that aliases repeat")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:  # whose own text is several lines
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise yaml.YAMLError(f"{error.problem or error.context}{where}") from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"a value that does not fit its kind: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _nodes(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values below a node, itself included; `sizes` holds those known, 0 for nodes that are being counted."""
    known = sizes.get(id(node))
    if known is not None:
        if known == 0:
            raise yaml.YAMLError("something that holds itself, by an alias")
        return known
    sizes[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        total += sum(_nodes(key, sizes) + _nodes(value, sizes) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_nodes(item, sizes) for item in node.value)
    elif "\0" in node.value:
        raise yaml.YAMLError("a text with a NUL character")
    elif len(node.value) > MOST_DIGITS and node.tag.endswith((":int", ":float")):
        raise yaml.YAMLError(f"a number of more than {MOST_DIGITS} letters")
    sizes[id(node)] = total
    return total


def _count(value: object, most: int, levels: int) -> int:
    """Values in lists and mappings, as far as `most`; lists that are there twice count twice."""
    if not isinstance(value, list | tuple | dict | set):
        return 1
    if levels == 0:
        return most + 1
    total = 1
    items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
    for item in items:
        total += _count(item, most - total, levels - 1)
        if total > most:
            break
    return total
