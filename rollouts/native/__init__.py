"""The built-in engine: a Hugging Face model and a slot cache in this process."""
