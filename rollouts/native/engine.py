"""In-process rollout engine over any Hugging Face causal LM: slot KV cache, refilled as sequences finish.

One forward prefills the prompts of the free slots, then each step decodes one token of every running
sequence. Finished sequences leave the batch at once, so that the long tail costs what it still generates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.moe.replay import RouterReplay, laid_out
from model.moe.routers import RoutingRecorder, find_routers
from rollouts.engine import Request, Sample
from rollouts.native.cache import SlotCache, layer_windows
from rollouts.native.slots import SlotTable

ROUTING_STEPS = 32
"""Decode steps between two evaluations of the routers' records: fewer small kernels, bounded memory."""


class NativeEngine:
    """`Engine` that samples with a transformers model of its own (it must not be the one being trained).

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
            raise ValueError(f"rollout.slots: {slots} is less than 1")
        self.model = model.eval()
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.config = self.decoder.config
        self.windows = layer_windows(self.config)
        self.routers = len(find_routers(model))
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.slots = slots
        self.weight_version = weight_version
        self.prefill_tokens = prefill_tokens
        self.record_experts = record_experts
        _check_form(self.model, self.decoder, self.head)

    @property
    def device(self) -> torch.device:
        """Where the model's input embeddings lie."""
        return self.decoder.get_input_embeddings().weight.device

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample per request, in request order; the tokens of a request do not depend on the others.

        ValueError for an empty prompt, a limit below 1, a negative temperature, or a prompt that leaves less
        than max_new_tokens of the model's positions. RuntimeError on log-probs that are not finite.
        """
        _check_requests(requests, getattr(self.config, "max_position_embeddings", None))
        if not requests:
            return []
        recorder = RoutingRecorder(self.model) if self.routers else nullcontext()
        with recorder as routing:
            samples = dict(_Run(self, requests, routing).finished())
        return [samples[index] for index in range(len(requests))]

    @torch.inference_mode()
    def score(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        temperature: float,
        experts: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Log-probs of each completion: see `Engine.score`. No cache and no masks of ours take part."""
        scores: dict[int, Tensor] = {}
        with nullcontext() if experts is None else RouterReplay(self.model) as replay:
            for batch in _length_batches([len(p) + len(c) for p, c in pairs], self.prefill_tokens):
                ids = _padded([torch.cat(pairs[index]) for index in batch], self.pad_token_id).to(self.device)
                if experts is not None:
                    replay.set(*laid_out([experts[index] for index in batch], [ids.shape[1]] * len(ids), self.device))
                hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
                for row, index in enumerate(batch):
                    prompt, completion = len(pairs[index][0]), pairs[index][1].to(self.device)
                    states = hidden[row, prompt - 1 : prompt - 1 + len(completion)]
                    # No more rows of logits at once than decoding has.
                    parts = zip(states.split(self.slots), completion.split(self.slots), strict=True)
                    scores[index] = torch.cat([self._logprobs(*part, temperature) for part in parts]).cpu()
        return [scores[index] for index in range(len(pairs))]

    def _logprobs(self, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        logits = self.head(states).float() / (temperature or 1.0)
        return torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]

    def converted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the precision of the model's own tensors: see `Engine.converted`."""
        own = self.model.state_dict()
        return {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in weights.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy the weights in, converted to the model's precision: see `Engine.load_weights`.

        A tied tensor may be given under any one of its names.
        """
        own = self.model.state_dict()
        given = {own[name].data_ptr() for name in weights if name in own}
        problems = [
            f"missing {name}" for name, tensor in own.items() if name not in weights and tensor.data_ptr() not in given
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


class _Run:
    """One call of `generate`. All its state dies with it, so an interrupt leaves the engine as it was."""

    def __init__(self, engine: NativeEngine, requests: Sequence[Request], routing: RoutingRecorder | None) -> None:
        slots = min(engine.slots, len(requests))
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        limit = max(request.max_new_tokens for request in requests)
        self.engine = engine
        self.requests = requests
        self.routing = routing
        self.pending = list(range(len(requests)))[::-1]
        self.table = SlotTable(slots, limit, longest, engine.routers, engine.eos_token_ids, engine.device)
        self.cache = SlotCache(engine.windows, slots, longest)
        # A prefill costs about as much as a decode step: wait until an eighth of the slots is free.
        self.refill = max(1, slots // 8)
        self.unread = 0

    def finished(self) -> Iterator[tuple[int, Sample]]:
        """(place in the list of requests, sample), as they finish."""
        table = self.table
        while self.pending or table.count:
            refill = self.pending and (table.free >= self.refill or not table.count)
            ended = self._prefill() if refill else self._decode()
            if not ended:
                continue
            self._read_routing()
            places = [table.request[row] for row in ended]
            yield from zip(places, table.samples(ended, self.engine.weight_version), strict=True)
            longest = table.longest
            sources, targets = table.release(ended)
            if targets:
                self.cache.move(sources, targets, longest)

    def _prefill(self) -> list[int]:
        self._read_routing()
        table = self.table
        indices = self._next_prompts()
        prompts = [self.requests[index].prompt_ids for index in indices]
        start = table.count
        table.admit(indices, [self.requests[index] for index in indices])
        lengths = table.prompt[start : table.count]
        ids = _padded(prompts, self.engine.pad_token_id).to(self.engine.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self._forward(ids, positions, self.cache.prefill(start, lengths, ids.shape[1]))
        rows = torch.arange(len(indices), device=ids.device)
        if self.routing is not None:
            routing = self.routing.take()
            confidence = routing.confidence.view(-1, *ids.shape)
            table.confidence[start : table.count] = confidence[:, rows, lengths - 1].T.double()
            if self.engine.record_experts:
                experts = routing.experts.view(len(confidence), *ids.shape, -1)
                table.route(slice(start, table.count), torch.zeros_like(lengths), experts)
        return table.record(start, self.engine.head(hidden[rows, lengths - 1]))

    def _next_prompts(self) -> list[int]:
        """As many waiting requests, in order, as fit into the free slots and one forward."""
        chosen: list[int] = []
        width = 0
        while self.pending and len(chosen) < self.table.free:
            width = max(width, len(self.requests[self.pending[-1]].prompt_ids))
            if chosen and width * (len(chosen) + 1) > self.engine.prefill_tokens:
                break
            chosen.append(self.pending.pop())
        return chosen

    def _decode(self) -> list[int]:
        ids, positions = self.table.current()
        masks = self.cache.decode(positions[:, 0], self.table.longest)
        hidden = self._forward(ids, positions, masks)
        ended = self.table.record(0, self.engine.head(hidden[:, -1]))
        self.unread += 1
        if self.unread == ROUTING_STEPS:
            self._read_routing()
        return ended

    def _read_routing(self) -> None:
        """Add the confidence of the decode steps since the last reading; the batch was the same in all."""
        if self.routing is not None and self.unread:
            routing, count = self.routing.take(), self.table.count
            steps = routing.confidence.view(-1, self.unread, count)
            self.table.confidence[:count] += steps.sum(1, dtype=torch.float64).T
            if self.engine.record_experts:
                experts = routing.experts.view(len(steps), self.unread, count, -1).transpose(1, 2)
                # The newest token is not cached yet: the last forward was at the position before it.
                self.table.route(slice(0, count), self.table.length[:count] - 1 - self.unread, experts)
        self.unread = 0

    def _forward(self, ids: Tensor, positions: Tensor, masks: dict[int | None, Tensor]) -> Tensor:
        """Last hidden states [B, S, H]."""
        engine = self.engine
        dtype = engine.decoder.get_input_embeddings().weight.dtype
        additive = {window: torch.where(mask, 0.0, -torch.inf).to(dtype) for window, mask in masks.items()}
        if len(additive) > 1:
            kinds = zip(engine.config.layer_types, engine.windows, strict=True)
            attention_mask = {kind: additive[window] for kind, window in kinds}
        else:
            (attention_mask,) = additive.values()
        return engine.decoder(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


def _padded(ids: Sequence[Tensor], pad_token_id: int) -> Tensor:
    """[B, S] int64, padded on the right."""
    return nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=pad_token_id)


def _length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped by similar length, each group at most `max_tokens` when padded (or one sequence)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _check_requests(requests: Sequence[Request], max_positions: int | None) -> None:
    for index, request in enumerate(requests):
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise ValueError(f"request {index}: the prompt is empty; give at least one token")
        if request.max_new_tokens < 1:
            raise ValueError(f"request {index}: max_new_tokens is {request.max_new_tokens}; give at least 1")
        if request.temperature < 0:
            raise ValueError(f"request {index}: temperature is {request.temperature}; give 0 (greedy) or > 0")
        if max_positions is not None and prompt + request.max_new_tokens > max_positions:
            raise ValueError(
                f"request {index}: {prompt} prompt tokens + max_new_tokens {request.max_new_tokens} are more "
                f"than the model's {max_positions} positions; lower rollout.max_new_tokens or shorten it"
            )


@torch.inference_mode()
def _check_form(model: PreTrainedModel, decoder: nn.Module, head: nn.Module | None) -> None:
    """Some models scale or cap their logits after the output embeddings: those would be sampled wrongly."""
    attention = decoder.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"model.attention: {attention!r} takes no mask per slot; use sdpa or eager")
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; give a causal language model")
    ids = torch.arange(min(4, head.weight.shape[0]), device=head.weight.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    actual = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(actual, expected, rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output embeddings; "
            "the native rollout engine cannot run it"
        )
