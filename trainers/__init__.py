"""Encoders, methods, the training loop and the evaluations."""
