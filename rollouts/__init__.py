"""Rollouts: engines that sample, the worker that grades, the `Trajectory` record that leaves this room."""
