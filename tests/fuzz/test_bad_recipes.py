"""Recipes and overrides of any kind: they load, or are refused in one message that a person can read."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

import pipelines.packed.files
from configs.recipe import MOST_FILES, Recipe, RecipeError, claim_run_dir, load_recipe
from pipelines.foreign import MOST_MESSAGE, MOST_NODES, load_yaml
from tests.fuzz.trials import trials, try_all, with_memory
from trainers.methods import find_method, method_names

VALID: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 64,
    "data": {"source": "digits"},
    "views": {"plan": "digits"},
    "encoder": {"arch": "resnet8x4"},
    "optim": {"name": "sgd", "lr": 0.1},
    "schedule": {"warmup_epochs": 0},
}


def keys_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every setting and section by its path."""
    for name, field in model.model_fields.items():
        yield (*path, name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind, (*path, name))


KEYS = sorted({*keys_of(Recipe), *(("method", *k) for n in method_names() for k in keys_of(find_method(n).Config))})
ODD_TEXTS = [
    *("", " ", "\t", "\n", "a\nb", "\x1b[2J", "%s%n", "{}", "[", "~", "~nobody-of-this-name/x", "/", "/dev/zero", "."),
    *(
        "../../../../etc/passwd",
        "a" * 300,
        "a" * 5000,
        "\ud800",
        "ünïcödé",
        "\u202e",
        "x;touch /tmp/no",
        "$(id)",
        "`id`",
    ),
    *("nosuch://x", "memory://x", "file:///dev/zero", "::", "a::b", "zip://x::memory://y", "null", "1e400", "<b>"),
]
ODD_NUMBERS = [
    *(0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**300, 1 << 5000, 0.0, -0.0, 0.5, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
]
LEAVES = st.one_of(
    st.sampled_from([None, True, False, b"\0\xff", datetime.date(2020, 1, 1), *ODD_TEXTS, *ODD_NUMBERS]),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
KEY_NAMES = st.one_of(st.sampled_from([key[-1] for key in KEYS]), st.text(max_size=8), st.sampled_from([0, None, 1.5]))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEY_NAMES, inner, max_size=4), max_leaves=8
)


@st.composite
def changed(draw: Any) -> dict[str, Any]:
    """A valid recipe with one to three settings replaced by anything, of any method."""
    settings: dict[str, Any] = {**VALID, "method": {"name": draw(st.sampled_from(method_names()))}}
    for _ in range(draw(st.integers(1, 3))):
        *sections, name = draw(st.sampled_from(KEYS))
        place = settings
        for section in sections:
            inner = place.get(section)
            place[section] = place = dict(inner) if isinstance(inner, dict) else {}
        place[name] = draw(VALUES)
    return settings


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines.packed.files, "_PAUSES", ())  # a URL that fails is not tried again


def loads(path: Path, *overrides: str) -> Recipe | None:
    """None where it is refused, readably."""
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        readable(error)
        return None


def readable(error: Exception) -> None:
    text = str(error)
    assert text
    assert len(text) <= MOST_MESSAGE, f"{len(text)} letters"
    assert "Traceback" not in text
    assert not any(letter < " " and letter != "\n" for letter in text), repr(text)
    text.encode()


@trials(quick=100, many=10_000)
def test_any_setting_may_be_anything(count: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    def check(settings: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(settings), errors="replace")
        recipe = loads(path)
        if recipe is not None:
            assert yaml.safe_dump(recipe.resolved())
            assert len(recipe.hash()) == 8

    try_all(check, changed(), count)


TOKENS = [
    *(
        "a",
        "epochs",
        "method",
        ":",
        ": ",
        "- ",
        "\n",
        " ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "&a ",
        "*a",
        "<<",
        "!!int ",
        "!!str ",
    ),
    *("!!binary ", "!!set ", "!!omap ", "!!timestamp ", "!!python/object/apply:os.system ", "? ", "|", ">", "'", '"'),
    *("\\", "#", "%YAML 1.1\n", "---\n", "...\n", "\t", "0x", "1", "1:1", "1e9", ".inf", "~", "\0", "\ufeff", "é", "="),
    *("2001-99-99", "2001-01-01 99:99:99", "!<", "!!", "extends", "yes", "@", "\x85", "0o9", "_", "-"),
]


@trials(quick=200, many=20_000)
def test_any_text_may_be_a_recipe(count: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        loads(path)

    soup = st.lists(st.sampled_from(TOKENS), max_size=30).map("".join)
    try_all(check, soup | st.text(max_size=60), count)


@trials(quick=80, many=5_000)
def test_any_argument_may_be_an_override(count: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALID))
    values = st.one_of(st.sampled_from(ODD_TEXTS), st.lists(st.sampled_from(TOKENS), max_size=6).map("".join))
    keys = st.sampled_from([".".join(key) for key in KEYS]) | st.text(max_size=12)
    pairs = st.lists(st.builds("{}={}".format, keys, values) | st.text(max_size=20), max_size=3)
    try_all(lambda overrides: loads(path, *overrides) and None, pairs, count)


# ---- bombs and loops -----------------------------------------------------------------------------------


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"method: *a{levels - 1}"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (laughs(10), "with those that aliases repeat"),
        (laughs(10).replace("method", "epochs"), "with those that aliases repeat"),
        (laughs(3), "method="),
        ("a: &a [*a]", "holds itself"),
        ("data: &a {source: digits, <<: *a}", "holds itself"),
        ("[" * 100_000, "inside each other"),
        ("{a: " * 20_000, "inside each other"),
        ("- " * 20_000 + "x", "inside each other"),
        ("epochs: 0x" + "f" * 20_000, "more than 400 letters"),
        ("epochs: " + "9" * 20_000, "more than 400 letters"),
        ("epochs: 1" + ":59" * 20_000, "more than 400 letters"),
        ("epochs: 0x" + "f" * 390, "epochs"),
        ("seed: 2001-99-99", "does not fit"),
        ("seed: !!int x", "does not fit"),
        ("seed: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ('data: {source: folder, root: "a\\0b"}', "NUL"),
        ("data: {source: folder, root: ~nobody-of-this-name/x}", "root"),
        ("data: {source: folder, root: " + "a" * 300 + "}", "path is too long"),
        ("data: {source: digits, root: " + "a" * 300 + "}", "path is too long"),
        ("x" * 300_000, "more than"),
        ("a: [" + "x, " * (MOST_NODES + 1) + "]", "more than"),
    ],
)
def test_bombs_are_refused_within_bounds(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    said = with_memory(400, lambda: load_recipe(path))
    assert said.startswith("RecipeError: ")
    assert reason in said
    assert len(said) < MOST_MESSAGE + 100


def test_aliases_within_bounds_are_understood() -> None:
    assert load_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_files_that_extend_each_other_end(tmp_path: Path) -> None:
    def write(name: str, extends: Any) -> Path:
        (tmp_path / name).write_text(yaml.safe_dump({"extends": extends, **VALID}))
        return tmp_path / name

    write("0.yaml", [])
    for number in range(1, 61):  # two paths to each: 2^60 readings, were they not remembered
        last = write(f"{number}.yaml", [f"{number - 1}.yaml"] * 2)
    assert loads(last) is not None
    for number in range(61, MOST_FILES + 5):
        last = write(f"{number}.yaml", f"{number - 1}.yaml")
    with pytest.raises(RecipeError, match=f"more than {MOST_FILES} files"):
        load_recipe(last)
    write("one.yaml", "two.yaml")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(write("two.yaml", "one.yaml"))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "latin-1"])
def test_what_is_no_text_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(b"a: \xe9\n")
    assert with_memory(400, lambda: load_recipe(path), seconds=60).startswith("RecipeError: ")
    outer = tmp_path / "outer.yaml"
    outer.write_text(f"extends: {path}\n")
    assert with_memory(400, lambda: load_recipe(outer), seconds=60).startswith("RecipeError: ")


@pytest.mark.parametrize("text", ["[]", "x", "epochs: many", "{}", "\xff", "[" * 9999, "a: &a [*a]", "epochs: null"])
def test_a_damaged_recipe_in_a_run_folder_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALID))
    recipe, run = load_recipe(path), tmp_path / "run"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "recipe.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        claim_run_dir(run, recipe)
    readable(caught.value)
