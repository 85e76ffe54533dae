"""Log-probs without logits against the naive way: time and memory at a large vocabulary.

    python benchmarks/logprob.py [--tokens 2048] [--vocabulary 128896] [--hidden 512] [--repeats 3]

Forward (log-probs and entropies of all tokens) and backward, in float32, both ways in one process.
"""

from __future__ import annotations

import argparse
import sys

import torch
from measuring import median_seconds, peak_mib
from torch import Tensor, nn
from writing import table, write_results

from mispo.trainer.logprob import CHUNK_BYTES, LogprobHead


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_896)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    head = nn.Linear(options.hidden, options.vocabulary, bias=False)
    hidden = torch.randn(options.tokens, options.hidden, requires_grad=True)
    targets = torch.randint(options.vocabulary, (options.tokens,))
    chunked = LogprobHead(head, torch.float32, entropy_gradient=False)

    def naive() -> tuple[Tensor, ...]:
        logp = head(hidden).log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return backward(logp.gather(1, targets[:, None])[:, 0], entropy)

    def ours() -> tuple[Tensor, ...]:
        return backward(*chunked(hidden, targets, 1.0))

    def backward(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        return logprobs.detach(), entropy, *torch.autograd.grad(logprobs.sum(), [hidden, head.weight])

    gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), naive(), strict=True)]
    ways = {"naive": naive, "chunked": ours}
    memory = {name: peak_mib(way) for name, way in ways.items()}
    seconds = {name: median_seconds(way, options.repeats) for name, way in ways.items()}
    rows = [[name, f"{seconds[name]:.2f}", f"{memory[name]:,.0f}"] for name in ways]
    rows.append(["ratio", *(f"{part['chunked'] / part['naive']:.2f}" for part in (seconds, memory))])
    body = (
        f"{options.tokens} tokens, vocabulary {options.vocabulary}, hidden size {options.hidden}, float32; chunks of "
        f"{CHUNK_BYTES // (4 * options.vocabulary)} tokens. Peak memory includes the gradient of the weight, "
        f"{options.vocabulary * options.hidden * 4 / 2**20:.0f} MiB in both. Largest relative difference of log-probs, "
        f"entropies and gradients: {max(gaps):.0e}. Target: ratio of memory ≤ 0.2.\n\n"
        + table(("", "seconds, forward and backward", "peak MiB"), rows)
    )
    sys.stdout.write(f"{write_results('logprob', 'Log-probs without logits', body, torch.get_num_threads())}\n")


if __name__ == "__main__":
    main()
