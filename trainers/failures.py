"""Failures of training whose cause is known."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on, for a known reason; the message is for the user."""
