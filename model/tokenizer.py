"""A character tokenizer that is saved, loaded and templated like any Hugging Face tokenizer."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT, UNKNOWN = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>"
THINK, END_THINK = "<think>", "</think>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '<|assistant|>' + message.content + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per printable ASCII character, turn marker and think tag.

    Think tags are not special tokens, so that they survive `decode(skip_special_tokens=True)`: verifiers read them.
    """
    characters = ["\n", *(c for c in string.printable if c.isprintable())]
    vocabulary = {t: i for i, t in enumerate([PAD, END, USER, ASSISTANT, UNKNOWN, THINK, END_THINK, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True) for t in (PAD, END, USER, ASSISTANT, UNKNOWN)])
    backend.add_tokens([AddedToken(t, special=False) for t in (THINK, END_THINK)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
