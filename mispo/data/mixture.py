"""A weighted mixture of sources, which is a source itself: its state is one position, as that of a single source.

The source at a position is computed without any state. The problems of a source of weight w (a share, all weights sum
to 1) come one after the other, the k-th at the time (k + u) / w, where u in [0, 1) is a hash of (seed, name, k). The
problems of all sources, sorted by time, are the stream. So

- each source keeps its own order, none of its problems is left out, and a file is read to its end before any of its
  rows comes again;
- among the first n positions a source of weight w has n·w ± (1 + w · number of sources), for all weights and n; its
  positions look random;
- the position p lies near the time p: only the few problems around it have to be sorted to know which one it is.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mispo.data.sources import Problem, Source, SourceSettings, open_source

STRIDE = 2**24
"""Positions that a source advances to find another problem in the place of a held-out one."""

MAX_TRIES = 64
"""Problems looked at for one position of the stream; of a generator one in six is held out."""


class MixedSettings(SourceSettings, Protocol):
    """One source of `data.mixture`. weight: share of its problems in the stream, relative to other weights, > 0."""

    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Interleaving:
    """Places the problems of several sources in one stream. weights: by name of the source, > 0, any sum."""

    weights: Mapping[str, float]
    seed: int

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"data.mixture.{name}.weight: must be above 0 (is {weight})")

    def place(self, position: int) -> tuple[str, int]:
        """Return the source at a position of the stream, and the position within that source."""
        total, count = math.fsum(self.weights.values()), len(self.weights)
        before, near = 0, []
        for name, weight in self.weights.items():
            share = weight / total
            # Earlier ones come before this position for sure, later ones after it.
            first = max(0, math.floor((position - count) * share) - 1)
            last = math.ceil((position + 1 + count) * share) + 1
            before += first
            near += [((k + self._jitter(name, k)) / share, name, k) for k in range(first, last + 1)]
        _, name, k = sorted(near)[position - before]
        return name, k

    def _jitter(self, name: str, k: int) -> float:
        digest = hashlib.blake2b(f"{self.seed}:{name}:{k}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / 2**53


class Mixture:
    """Draws from several sources by an interleaving; each row gets its source's name as the column `source`.

    A held-out problem is replaced by the problem one stride further on in the same source, so shares stay those of the
    weights. A problem that one source holds out does not come from another source either.
    heldout: `held_out` problems, interleaved as the stream. ValueError if a source holds out less than its share.
    """

    def __init__(self, sources: Mapping[str, Source], interleaving: Interleaving, held_out: int) -> None:
        self._sources, self._place = sources, interleaving.place
        places = map(self._place, range(held_out))
        self.heldout: Sequence[Problem] = [_named(sources[name].heldout[k], name) for name, k in places]
        self._held_out_texts = {problem.text for problem in self.heldout}

    def problem(self, position: int) -> Problem | None:
        name, own = self._place(position)
        for attempt in range(MAX_TRIES):
            problem = self._sources[name].problem(own + attempt * STRIDE)
            if problem is not None and problem.text not in self._held_out_texts:
                return _named(problem, name)
        return None


def open_mixture(mixture: Mapping[str, MixedSettings], *, seed: int, held_out: int) -> Source:
    """Open all sources of `data.mixture`, and hold out problems of each by its weight; a single one is not mixed.

    ValueError as from `open_source`, and for a weight that is not above 0.
    """
    interleaving = Interleaving({name: settings.weight for name, settings in mixture.items()}, seed)
    counts = Counter(interleaving.place(position)[0] for position in range(held_out))
    sources = {
        name: open_source(settings, seed=seed, held_out=counts[name], section=f"data.mixture.{name}")
        for name, settings in mixture.items()
    }
    if len(sources) == 1:
        return next(iter(sources.values()))
    return Mixture(sources, interleaving, held_out)


def _named(problem: Problem, source: str) -> Problem:
    return replace(problem, row={**problem.row, "source": source})
