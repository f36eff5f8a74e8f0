"""The parts of ``tools.report``: what is read from runs, what is computed, and how a page is written."""
