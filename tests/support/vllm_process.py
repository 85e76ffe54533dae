"""Child processes in vLLM's environment, .venv-vllm, with a deadline."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
DEADLINE_S = 300
SETTINGS = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

Pairs = list[tuple[list[int], list[int]]]


def run_in_vllm(*arguments: str | Path) -> str:
    """What the program prints; an AssertionError with its last words if it fails or is too slow."""
    assert PYTHON.is_file(), f"no {PYTHON.relative_to(ROOT)}: `make test-vllm` makes it"
    command = [str(argument) for argument in (PYTHON, "-P", *arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=DEADLINE_S, env=os.environ | SETTINGS
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")[-2000:]
        raise AssertionError(f"vLLM did not answer within {DEADLINE_S} s; its last words: {said}") from error
    assert done.returncode == 0, f"vLLM's process ended with {done.returncode}: {done.stderr[-4000:]}"
    return done.stdout


def vllm_logprobs(model: Path, dtype: str, pairs: Pairs, work: Path) -> list[list[float]]:
    """Of each completion's tokens after its prompt, raw (temperature 1)."""
    request, answer = work / "request.json", work / "answer.json"
    request.write_text(json.dumps({"model": str(model), "dtype": dtype, "pairs": pairs}))
    run_in_vllm(ROOT / "tests/vllm/score_script.py", request, answer)
    said = json.loads(answer.read_text())
    assert said["architectures"] == ["Step3p5ForCausalLM"]
    return said["logprobs"]
