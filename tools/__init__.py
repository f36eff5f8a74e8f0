"""Command-line tools, each run as ``python -m tools.NAME``."""
