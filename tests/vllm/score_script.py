"""Runs in vLLM's own environment: log-probs of given completions under a checkpoint.

    python score_script.py REQUEST.json ANSWER.json

REQUEST: model (directory), dtype, pairs of [prompt ids, completion ids].
ANSWER: architectures, logprobs (one list a pair).
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from rollouts.vllm.cpu_router import route_sigmoid_on_cpu


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text())
    route_sigmoid_on_cpu()
    engine = LLM(model=asked["model"], dtype=asked["dtype"], enforce_eager=True, max_model_len=256, max_num_seqs=16)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt + completion} for prompt, completion in asked["pairs"]],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
    )
    logprobs = [
        [output.prompt_logprobs[len(prompt) + i][token].logprob for i, token in enumerate(completion)]
        for output, (prompt, completion) in zip(outputs, asked["pairs"], strict=True)
    ]
    architectures = engine.llm_engine.model_config.architectures
    answer.write_text(json.dumps({"architectures": architectures, "logprobs": logprobs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
