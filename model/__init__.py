"""Models: Step on transformers' layers, critic, adapters, routers of any MoE, presets, tokenizer.

Importing this package teaches transformers' auto classes to open Step checkpoints without remote code.
"""

from transformers import AutoModelForCausalLM
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from model.step.step import StepForCausalLM

AutoModelForCausalLM.register(Step3p7TextConfig, StepForCausalLM, exist_ok=True)
