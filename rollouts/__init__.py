"""Rollouts: engines that sample, environments that reply, and the `Trajectory` record that they give."""
