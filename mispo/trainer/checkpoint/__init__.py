"""Checkpoints: writing and reading them."""
