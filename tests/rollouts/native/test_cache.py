"""Slot cache: masks against transformers' own mask functions, rings, growth, moves."""

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from rollouts.native.cache import SlotCache, layer_windows, visible
from support.tiny_models import step_config

HEADS, DIM = 2, 3


def states(positions: torch.Tensor) -> torch.Tensor:
    """[B, HEADS, S, DIM] whose entries tell the position [B, S] and the head."""
    head = torch.arange(HEADS).view(1, HEADS, 1, 1) / 10
    return (positions[:, None, :, None] + head).expand(-1, -1, -1, DIM).float()


def run_slot_cache(windows: list[int | None], lengths: list[int], steps: int, max_length: int) -> SlotCache:
    """Prefill one prompt per slot, then decode; every update writes position numbers."""
    cache = SlotCache(windows, len(lengths), max_length)
    prompt = torch.tensor(lengths)
    width = max(lengths)
    cache.prefill(0, prompt, width)
    padded = torch.arange(width).expand(len(lengths), width)
    for layer in range(len(windows)):
        cache.update(states(padded), -states(padded), layer)
    for step in range(steps):
        positions = prompt + step
        masks = cache.decode(positions, int(positions.max()) + 1)
        for layer, window in enumerate(windows):
            keys, values = cache.update(states(positions[:, None]), -states(positions[:, None]), layer)
            assert masks[window].shape == (len(lengths), 1, 1, keys.shape[2])
            for row, position in enumerate(positions.tolist()):
                seen = keys[row, :, masks[window][row, 0, 0]]
                first = 0 if window is None else max(0, position - window + 1)
                assert seen[0, :, 0].sort().values.tolist() == list(range(first, position + 1))
                assert torch.allclose(seen[1], seen[0] + 0.1)
                assert torch.equal(values[row], -keys[row])
    return cache


@pytest.mark.parametrize("window", [None, 1, 5, 8, 64])
def test_visible_is_transformers_mask(window: int | None) -> None:
    positions = torch.arange(20)
    if window is None:
        expected = causal_mask_function(0, 0, positions[:, None], positions[None])
    else:
        expected = sliding_window_causal_mask_function(window)(0, 0, positions[:, None], positions[None])
    assert torch.equal(visible(positions, positions, window), expected)


def test_decode_sees_exactly_the_window_of_each_slot() -> None:
    run_slot_cache([None, 5, 8, 64], lengths=[1, 4, 5, 13, 9], steps=30, max_length=43)


def test_prefill_mask_is_the_causal_one() -> None:
    cache = SlotCache([None, 4], slots=3, max_length=32)
    masks = cache.prefill(1, torch.tensor([6, 2]), 6)
    for window, mask in masks.items():
        assert torch.equal(mask[0, 0], visible(torch.arange(6), torch.arange(6), window))


def test_buffers_grow_with_the_lengths_and_stop_at_the_limit() -> None:
    cache = run_slot_cache([None, 8], lengths=[3], steps=10, max_length=100)
    assert [layer.keys.shape[2] for layer in cache.layers] == [16, 8]
    cache = run_slot_cache([None, 8], lengths=[3], steps=97, max_length=100)
    assert [layer.keys.shape[2] for layer in cache.layers] == [112, 8]


def test_move_copies_slots() -> None:
    cache = run_slot_cache([None, 5], lengths=[3, 9, 7], steps=6, max_length=16)
    expected = [(layer.keys[2].clone(), layer.values[2].clone()) for layer in cache.layers]
    cache.move([2], [0], 13)
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys[0, :, :13], keys[:, :13])
        assert torch.equal(layer.values[0, :, :13], values[:, :13])


def test_a_forward_of_another_batch_is_caught() -> None:
    cache = SlotCache([None], slots=2, max_length=8)
    cache.prefill(0, torch.tensor([2, 2]), 2)
    with pytest.raises(AssertionError, match="batch"):
        cache.update(torch.zeros(1, HEADS, 2, DIM), torch.zeros(1, HEADS, 2, DIM), 0)


def test_layers_of_another_kind_are_refused() -> None:
    config = step_config()
    assert layer_windows(config) == [None, 8, 8]
    config.layer_types = ["full_attention", "linear_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="linear_attention are not supported"):
        layer_windows(config)
