"""Hydra recipes: YAML that overrides the defaults in `mispo.config`, and nothing else."""
