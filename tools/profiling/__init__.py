"""The parts of `python -m tools.profile`."""
