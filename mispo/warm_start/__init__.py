"""Supervised steps on generated traces before RL, for the built-in toy task."""
