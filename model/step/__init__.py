"""The Step model, and what travels with its checkpoints."""
