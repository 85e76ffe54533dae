"""Checkpoints: what is written is read here too."""
