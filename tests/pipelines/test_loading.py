"""Generators run in a thread ahead of their consumer."""

import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest

from pipelines.loading import in_background


def test_in_background_keeps_order_and_raises_what_was_raised() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(number for number in in_background(numbers(), 2))
    assert seen == list(range(5))
    assert all(b - a == 1 for a, b in pairwise(in_background((i for i in range(50)), 1)))


def test_in_background_closed_early_ends_its_thread_and_its_iterator() -> None:
    ended = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.append(threading.current_thread().name)

    before = threading.active_count()
    items = in_background(endless(), 1)
    next(items)
    items.close()
    assert ended == ["twinstream-loader"]
    assert threading.active_count() == before
