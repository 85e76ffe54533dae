"""Slot KV cache: every running sequence has one slot, and sequences grow independently of each other.

The active sequences are always the slots 0 … n−1, so that a decode step reads views, never gathered copies.
A sliding-window layer keeps a ring of `window` cells: position p lives in cell p mod window. Keys carry their
rotary position already, so attention does not care in which order the cells lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from model.facts import windows_of

ROUND = 16
"""Cells by which reads and buffers grow, so that shapes change rarely."""


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """Read the sliding window of each decoder layer, None where attention is full.

    ValueError for layers that are neither (linear, chunked, …): those need another cache.
    """
    kinds = getattr(config, "layer_types", None) or ()
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"model: layers of kind {', '.join(unknown)} are not supported by the native rollout engine; "
            "it knows full_attention and sliding_attention"
        )
    return list(windows_of(config))


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return whether the query at position q sees the key at position k, q − window < k ≤ q; bool [..., Q, K]."""
    distance = queries.unsqueeze(-1) - keys
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


class SlotLayer:
    """Keys and values of one layer, [slots, kv_heads, cells, head_dim]; shapes come from the first update."""

    def __init__(self, slots: int, max_length: int, window: int | None) -> None:
        self.slots = slots
        self.window = window
        self.limit = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.grow(slots, max_length)

    def grow(self, slots: int, max_length: int) -> None:
        """Allow more slots or longer sequences; never fewer or shorter ones."""
        limit = round_up(max_length)
        self.limit = max(self.limit, limit if self.window is None else min(self.window, limit))
        self.slots = max(slots, self.slots)
        if self.keys is not None and self.values is not None and self.slots > len(self.keys):
            cells = self.keys.shape[2]
            self.keys = _grown(self.keys, self.keys, self.slots, cells)
            self.values = _grown(self.values, self.values, self.slots, cells)

    def reserve(self, length: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for `length` positions and return the buffers of keys and values.

        At least doubles, so that growing costs little over a whole run and memory follows the lengths that occur, not
        the longest one allowed.
        """
        held = 0 if self.keys is None else self.keys.shape[2]
        needed = min(length, self.limit)
        if self.keys is None or self.values is None or needed > held:
            cells = min(round_up(max(needed, 2 * held)), self.limit)
            self.keys = _grown(self.keys, key, self.slots, cells)
            self.values = _grown(self.values, value, self.slots, cells)
        return self.keys, self.values


def _grown(old: Tensor | None, like: Tensor, slots: int, cells: int) -> Tensor:
    # Zeros: a cell not yet written is masked, but NaN garbage times a zero weight would still be NaN.
    new = like.new_zeros(slots, like.shape[1], cells, like.shape[3])
    if old is not None:
        new[: len(old), :, : old.shape[2]] = old
    return new


class SlotCache(Cache):
    """transformers' `past_key_values` over slots. Call `prefill` or `decode` before each forward.

    windows: sliding window per layer, None for full attention. slots: sequences that fit at once.
    max_length: positions that a sequence may come to hold.
    A decoder that gets its masks calls only update, get_seq_length and get_mask_sizes; the abstract per-layer methods
    of transformers differ between 5.19 and 5.23 and are not used.
    """

    def __init__(self, windows: Sequence[int | None], slots: int, max_length: int) -> None:
        self.slot_layers = [SlotLayer(slots, max_length, window) for window in windows]
        super().__init__(layers=cast(Any, self.slot_layers))
        self.windows = sorted(set(windows), key=lambda window: window or 0)
        self.prefilling = True
        self.start = 0
        self.count = 0
        self.longest = 0
        self.cells: dict[int | None, Tensor] = {}
        self.rows: dict[tuple[int | None, int, int], Tensor] = {}

    def grow(self, slots: int, max_length: int) -> None:
        """Allow more slots or longer sequences; what is cached stays."""
        for layer in self.slot_layers:
            layer.grow(slots, max_length)

    def prefill(self, start: int, lengths: Tensor, longest: int) -> dict[int | None, Tensor]:
        """Prepare a forward of right-padded prompts in the slots start … start+B−1.

        lengths: [B] prompt tokens; longest: their maximum, the width S of the forward.
        Returns the attention mask of each window, bool [1, 1, S, S]. Keys past a prompt's end are written but
        stay invisible until decoding overwrites them.
        """
        self.prefilling, self.start, self.count, self.longest = True, start, len(lengths), longest
        positions = torch.arange(longest, device=lengths.device)
        self.cells = {}
        masks = {}
        for window in self.windows:
            masks[window] = visible(positions, positions, window)[None, None]
            if window is not None and longest > window:
                # Cell c keeps the prompt's last position that is c modulo the window.
                last = lengths[:, None] - 1
                cell = torch.arange(window, device=lengths.device)
                self.cells[window] = (last - (last - cell) % window).clamp_min(0)
        return masks

    def decode(self, positions: Tensor, longest: int) -> dict[int | None, Tensor]:
        """Prepare a forward of one token for each of the slots 0 … n−1.

        positions: [n] position of that token = tokens cached before it; longest: max(positions) + 1.
        Returns the attention mask of each window, bool [n, 1, 1, cells read].
        """
        self.prefilling, self.start, self.count = False, 0, len(positions)
        self.longest = round_up(longest)
        self.cells = {}
        self.rows = {}
        masks = {}
        for window in self.windows:
            self.cells[window] = positions if window is None else positions % window
            read = self.longest if window is None else min(self.longest, window)
            cells = torch.arange(read, device=positions.device)
            # In a ring every cell holds one of the last `window` positions, once it has been written.
            masks[window] = visible(positions[:, None, None], cells, None)
        return masks

    def move(self, sources: list[int], targets: list[int], longest: int) -> None:
        """Copy the first `longest` positions of slots: closes the gaps that finished sequences leave."""
        for layer in self.slot_layers:
            for buffer in (layer.keys, layer.values):
                assert buffer is not None, "sequences run, so a prefill has written"
                buffer[targets, :, :longest] = buffer[sources, :, :longest]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write this forward's keys and values [B, kv_heads, S, head_dim]; return what attention reads."""
        layer = self.slot_layers[layer_idx]
        keys, values = layer.reserve(self.longest, key_states, value_states)
        assert key_states.shape[0] == self.count, "the forward's batch is not the announced one"
        if self.prefilling:
            cells = self.cells.get(layer.window)
            for buffer, new in ((keys, key_states), (values, value_states)):
                if cells is not None:
                    new = new.gather(2, cells[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
                buffer[self.start : self.start + self.count, :, : new.shape[2]] = new
            return key_states, value_states
        rows = self._rows(layer.window, keys)
        for buffer, new in ((keys, key_states), (values, value_states)):
            buffer.view(-1, buffer.shape[3]).index_copy_(0, rows, new.reshape(-1, new.shape[3]))
        return keys[: self.count, :, : self.longest], values[: self.count, :, : self.longest]

    def _rows(self, window: int | None, keys: Tensor) -> Tensor:
        """Return the rows [n · kv_heads] of the flattened buffer that this step writes; equal layers share them."""
        _, heads, cells, _ = keys.shape
        key = (window, heads, cells)
        if key not in self.rows:
            first = torch.arange(self.count * heads, device=keys.device) * cells
            self.rows[key] = first + self.cells[window].repeat_interleave(heads)
        return self.rows[key]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions that earlier forwards may have written; 0 while prefilling."""
        return 0 if self.prefilling else self.longest

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return (keys read, offset of the first), for decoders that call this although they got a mask."""
        window = self.slot_layers[layer_idx].window
        return (self.longest if window is None or self.prefilling else min(self.longest, window)), 0


def round_up(length: int) -> int:
    """Return the next multiple of `ROUND`."""
    return -(-length // ROUND) * ROUND
