"""Models: the Step MoE on transformers' own layers, the critic, the router recorder, presets, tokenizer."""
