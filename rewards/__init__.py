"""Rewards: verifiers that score a completion, run in child processes that can be killed."""
