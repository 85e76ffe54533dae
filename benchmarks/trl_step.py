"""TRL's GRPOTrainer on a load, without generation; trainer.py starts it, in an environment that has TRL.

    python benchmarks/trl_step.py OUT LOAD ROWS

TRL's own training loop runs; its `rollout_func` hands it the load's completions. The clock runs from there (completions
decoded, as a rollout needs) to the end of the last optimizer update of the step: padding, the old log-probs, rewards
and group advantages, the losses of all micro-batches of ROWS trajectories, the updates. Writes seconds of each round
and the mean old log-probs to the file OUT, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from load import Load, loads, sequences
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Stops after the last optimizer update of each step."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates == 0:
            self.seconds.append(now() - self.started)


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer with a clock that starts when its completions are there, and the old log-probs it computed."""

    clock: Clock
    logprobs: list[float]

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        self.clock.started = now()
        return found

    def _generate_and_score_completions(self, inputs: list[Any]) -> Any:
        found = super()._generate_and_score_completions(inputs)
        mask = found["completion_mask"]
        self.logprobs = ((found["old_per_token_logps"] * mask).sum(1) / mask.sum(1)).tolist()
        return found


def main() -> None:
    out, text, rows = sys.argv[1:]
    load = loads(text)
    clock = Clock(load.minibatches)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(load, int(rows), folder)
        trainer.clock = clock
        trainer.add_callback(clock)
        trainer.train()
    found = {"seconds": clock.seconds[1:], "logprobs": trainer.logprobs, "threads": torch.get_num_threads()}
    Path(out).write_text(json.dumps(found))


def build(load: Load, rows: int, folder: str) -> TimedTrainer:
    """With what makes TRL fast: no checkpointing of layers (its default), nothing logged or saved."""
    assert load.model, "TRL opens a Hugging Face directory"
    everything = sequences(load)
    count, groups = len(everything), len(everything) // load.samples_per_prompt
    bf16 = load.dtype == "bf16" or (load.dtype == "auto" and torch.cuda.is_available())
    settings = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=count // load.minibatches // rows,
        steps_per_generation=count // rows,
        num_generations=load.samples_per_prompt,
        max_completion_length=max(load.lengths),
        max_steps=load.minibatches * (load.rounds + 1),
        learning_rate=0.0,
        adam_beta2=0.95,
        weight_decay=0.1,
        loss_type="dapo",
        beta=0.0,
        router_aux_loss_coef=0.0,
        gradient_checkpointing=load.checkpointing,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": "float32", "attn_implementation": load.attention, "trust_remote_code": True},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
    )
    prompts = [str(group) for _ in range(load.rounds + 1) for group in range(groups)]
    return TimedTrainer(
        model=load.model,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(load.model),
        reward_funcs=reward,
        rollout_func=lambda asked, trainer: rollout(load, asked),
    )


def rollout(load: Load, asked: list[str]) -> dict[str, Any]:
    """The load's completions, whose prompts TRL asks for in order: `samples_per_prompt` times each."""
    everything = sequences(load)
    assert asked == [str(s.group) for s in everything], "TRL asks for other prompts"
    return {
        "prompt_ids": [s.prompt_ids for s in everything],
        "completion_ids": [s.completion_ids for s in everything],
        "logprobs": None,
        "known": [s.reward for s in everything],
    }


def reward(completions: list[Any], known: list[float], **kwargs: Any) -> list[float]:
    """What the load says."""
    return known


def now() -> float:
    """Seconds on a clock, once everything that was started is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
