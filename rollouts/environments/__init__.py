"""Environments: what stands between a prompt and the engine."""
