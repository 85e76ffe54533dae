"""In-process rollout engine over any Hugging Face causal LM: slot KV cache, refilled as sequences finish.

One forward prefills the prompts of the free slots, then each step decodes one token of every running
sequence. Finished sequences leave the batch at once, so that the long tail costs what it still generates.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.moe.replay import RouterReplay, laid_out
from rollouts.engine import Capabilities, Request, Sample
from rollouts.native.decoder import take_apart
from rollouts.native.running import Running, Waiting


class NativeEngine:
    """`Engine` that samples with a separate transformers model (it must not be the one being trained).

    model: causal LM whose logits are its output embeddings applied to its decoder's last hidden state; sdpa
    or eager attention, all layers full or sliding-window. Put into eval mode; decides device and precision.
    eos_token_ids: tokens that end a completion. pad_token_id: fills prompts to one length, never attended to.
    slots: sequences decoded at once. weight_version: version of the weights that `model` comes with.
    prefill_tokens: padded tokens in one prefill or scoring forward (at least one sequence); bounds memory.
    record_experts: keep which experts each position activated, `Sample.routed_experts`.
    ValueError for a model of another form.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        slots: int,
        *,
        weight_version: int = 0,
        prefill_tokens: int = 16384,
        record_experts: bool = False,
    ) -> None:
        if slots < 1:
            raise ValueError(f"engine.slots must be at least 1 (is {slots})")
        self.model = model.eval()
        self.decoder = take_apart(self.model, eos_token_ids, pad_token_id)
        self.prefill_tokens = prefill_tokens
        self.record_experts = record_experts
        self.slots = slots
        self.weight_version = weight_version
        self._tickets = itertools.count()
        self._waiting: Waiting = deque()
        self._running: Running | None = None
        self._asleep = False

    @property
    def can(self) -> Capabilities:
        """See `Engine.can`."""
        routed = self.decoder.routers > 0
        return Capabilities(experts=routed and self.record_experts, replay=routed, loops=False, stop_strings=False)

    def submit(self, request: Request) -> int:
        """Take a request, which gets a slot at the next refill: see `Engine.submit`.

        ValueError for an empty prompt, a limit below 1, a negative temperature, or a prompt that leaves less
        than max_new_tokens of the model's positions.
        """
        if self._asleep:
            raise RuntimeError("the rollout engine is asleep; call wake() before submit()")
        _check_request(request, getattr(self.decoder.stack.config, "max_position_embeddings", None))
        ticket = next(self._tickets)
        self._waiting.append((ticket, request))
        return ticket

    @torch.inference_mode()
    def finished(self) -> list[tuple[int, Sample]]:
        """Sample until at least one sequence has ended, or for ROUTING_STEPS steps: see `Engine.finished`.

        Log-probs depend on the other requests in the batch by rounding alone. RuntimeError if they are not finite.
        """
        if self._running is None:
            if not self._waiting:
                return []
            self._running = Running(
                self.decoder,
                self._waiting,
                slots=self.slots,
                prefill_tokens=self.prefill_tokens,
                record_experts=self.record_experts,
            )
        try:
            ended = self._running.advance(self._waiting, self.weight_version)
        except BaseException:
            self._running = None
            self._waiting.clear()
            raise
        self._rest()
        return ended

    @torch.inference_mode()
    def cancel(self, tickets: Collection[int]) -> None:
        """Drop running and waiting requests: see `Engine.cancel`."""
        dropped = set(tickets)
        self._waiting = deque(pair for pair in self._waiting if pair[0] not in dropped)
        if self._running is not None:
            self._running.drop(dropped)
        self._rest()

    def _rest(self) -> None:
        """Free the buffers once there is nothing left to do."""
        if self._running is not None and not self._running.table.count and not self._waiting:
            self._running = None

    def sleep(self) -> None:
        """Refuse requests until `wake`; the cache is freed whenever the engine is idle. See `Engine.sleep`."""
        if self._running is not None or self._waiting:
            raise RuntimeError("the rollout engine has requests; let them finish or cancel them before sleep()")
        self._asleep = True
        if self.decoder.embeddings.is_cuda:
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take requests again."""
        self._asleep = False

    @torch.inference_mode()
    def score(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        temperature: float,
        experts: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the log-probs of each completion, without our cache and masks: see `Engine.score`."""
        decoder = self.decoder
        device = decoder.embeddings.device
        scores: dict[int, Tensor] = {}
        with nullcontext() if experts is None else RouterReplay(self.model) as replay:
            for batch in _length_batches([len(p) + len(c) for p, c in pairs], self.prefill_tokens):
                ids = decoder.padded([torch.cat(pairs[index]) for index in batch])
                if experts is not None and replay is not None:
                    replay.set(*laid_out([experts[index] for index in batch], [ids.shape[1]] * len(ids), device))
                hidden = decoder.stack(input_ids=ids, use_cache=False).last_hidden_state
                for row, index in enumerate(batch):
                    prompt, completion = len(pairs[index][0]), pairs[index][1].to(device)
                    states = hidden[row, prompt - 1 : prompt - 1 + len(completion)]
                    # No more rows of logits at once than decoding has.
                    parts = zip(states.split(self.slots), completion.split(self.slots), strict=True)
                    scores[index] = torch.cat([self._logprobs(*part, temperature) for part in parts]).cpu()
        return [scores[index] for index in range(len(pairs))]

    def _logprobs(self, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        logits = self.decoder.head(states).float() / (temperature or 1.0)
        return torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]

    def converted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights in the precision of the model's tensors: see `Engine.converted`."""
        own = self.model.state_dict()
        return {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in weights.items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy the weights in, converted to the model's precision: see `Engine.load`.

        A tied tensor may come under any one of its names. RuntimeError while sequences are running.
        """
        if self._running is not None:
            raise RuntimeError(
                f"weights of version {version} cannot be loaded while sequences are running; let them finish or cancel "
                "them"
            )
        own = self.model.state_dict()
        filled = {own[name].data_ptr() for name in weights if name in own}
        problems = [
            f"missing {name}" for name, tensor in own.items() if name not in weights and tensor.data_ptr() not in filled
        ]
        problems += [f"unknown {name}" for name in weights if name not in own]
        problems += [
            f"{name} has shape {list(weights[name].shape)}, the model's is {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ValueError(
                f"weights of version {version} do not fit the rollout model (nothing was loaded): {shown}; "
                "give the state_dict of the same architecture"
            )
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        self.weight_version = version


def _length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices by similar length, each group at most `max_tokens` when padded (or one sequence)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _check_request(request: Request, max_positions: int | None) -> None:
    prompt = len(request.prompt_ids)
    if prompt == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if request.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1 (is {request.max_new_tokens})")
    if request.temperature < 0:
        raise ValueError(f"temperature must be at least 0 (is {request.temperature}); 0 is greedy")
    if max_positions is not None and prompt + request.max_new_tokens > max_positions:
        raise ValueError(
            f"{prompt} prompt tokens + max_new_tokens {request.max_new_tokens} are more than the model's "
            f"{max_positions} positions; lower rollout.max_new_tokens or shorten the prompt"
        )
