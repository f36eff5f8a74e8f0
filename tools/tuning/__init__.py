"""The parts of `python -m tools.tune`."""
