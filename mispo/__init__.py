"""mispo: reinforcement learning for Mixture-of-Experts reasoning models with MIS-PO (arXiv 2602.10604)."""

__version__ = "0.1.0"
