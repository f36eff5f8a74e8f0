"""Failures of training that have a known cause: a message for the user in place of a traceback."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on, for a reason that is known; the message is for the user. ``train.py`` exits with 1."""
