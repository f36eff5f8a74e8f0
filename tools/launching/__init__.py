"""The parts of ``tools.launch``."""
