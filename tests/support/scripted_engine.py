"""An engine that writes what a test says: it implements the protocol of rollouts/engine.py without any model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollouts.engine import Request, Sample

Script = Callable[[str, int, float], str]
"""(text of the prompt, number of the request for it, temperature) → completion."""


class ScriptedEngine:
    """`Engine` whose completions come from a script; those over the token limit are cut."""

    weight_version = 0

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Script) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        self.requests += requests
        asked: Counter[str] = Counter()
        samples = []
        for request in requests:
            text = self.tokenizer.decode(request.prompt_ids)
            samples.append(self._sample(request, self.script(text, asked[text], request.temperature)))
            asked[text] += 1
        return samples

    def _sample(self, request: Request, completion: str) -> Sample:
        ids = [*self.tokenizer(completion, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        cut = len(ids) > request.max_new_tokens
        kept = torch.tensor(ids[: request.max_new_tokens])
        return Sample(kept, torch.zeros(len(kept)), "length" if cut else "stop", self.weight_version, None, None)

    def converted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(weights)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.weight_version = version

    def score(
        self, pairs: Sequence[tuple[Tensor, Tensor]], temperature: float, experts: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        return [torch.zeros(len(completion)) for _, completion in pairs]
