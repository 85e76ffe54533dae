"""An engine that writes what a test says: it implements the protocol of rollouts/engine.py without any model."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollouts.engine import Capabilities, Request, Sample

Script = Callable[[str, int, float], str]
"""(text of the prompt, number of the request for it, temperature) → completion."""


class ScriptedEngine:
    """`Engine` whose completions come from a script; those over the token limit are cut."""

    weight_version = 0
    can = Capabilities(experts=False, replay=False, loops=False, stop_strings=False)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Script) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.requests: list[Request] = []
        self._ended: list[tuple[int, Sample]] = []
        self._waiting: list[str] = []

    def submit(self, request: Request) -> int:
        text = self.tokenizer.decode(request.prompt_ids)
        asked = self._waiting.count(text)
        self._waiting.append(text)
        self.requests.append(request)
        sample = self._sample(request, self.script(text, asked, request.temperature))
        self._ended.append((len(self.requests) - 1, sample))
        return len(self.requests) - 1

    def finished(self) -> list[tuple[int, Sample]]:
        ended, self._ended, self._waiting = self._ended, [], []
        return ended

    def cancel(self, tickets: Collection[int]) -> None:
        self._ended = [(ticket, sample) for ticket, sample in self._ended if ticket not in tickets]

    def sleep(self) -> None:
        """Nothing to free."""

    def wake(self) -> None:
        """Nothing was freed."""

    def _sample(self, request: Request, completion: str) -> Sample:
        ids = [*self.tokenizer(completion, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        cut = len(ids) > request.max_new_tokens
        kept = torch.tensor(ids[: request.max_new_tokens])
        return Sample(kept, torch.zeros(len(kept)), "length" if cut else "stop", self.weight_version, None, None)

    def converted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(weights)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.weight_version = version

    def score(
        self, pairs: Sequence[tuple[Tensor, Tensor]], temperature: float, experts: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        return [torch.zeros(len(completion)) for _, completion in pairs]
