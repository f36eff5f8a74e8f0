"""The parts of `python -m tools.export`: one file a format, each a ``job.Format``."""
