"""What is added to a verifier's reward for the form of a completion and not for its answer."""

from __future__ import annotations


def overlong_penalty(length: int, limit: int, buffer: int, penalty: float) -> float:
    """0 up to limit − buffer generated tokens, then linearly down to −penalty at the limit (DAPO, arXiv 2503.14476
    eq. 13, where the penalty is 1). 0 ≤ buffer ≤ limit; no buffer, no penalty."""
    if buffer == 0:
        return 0.0
    return -penalty * min(1.0, max(0.0, (length - (limit - buffer)) / buffer))
