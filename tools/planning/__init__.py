"""The parts of ``tools.plan``: what a step sends, computes and holds, as functions of the number of ranks."""
