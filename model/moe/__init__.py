"""Routers and experts of any Hugging Face MoE."""
