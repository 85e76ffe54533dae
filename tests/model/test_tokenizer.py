"""The character tokenizer is a normal Hugging Face one."""

import string
from pathlib import Path

from transformers import AutoTokenizer

from model.tokenizer import character_tokenizer

TEXT = "<think>138:0;69:1</think>3 of $#!~"


def test_text_survives_a_round_trip_and_tags_are_single_tokens() -> None:
    tokenizer = character_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert len(ids) == len(TEXT) - len("<think>") - len("</think>") + 2
    printable = "".join(c for c in string.printable if c.isprintable()) + "\n"
    assert tokenizer.decode(tokenizer(printable, add_special_tokens=False).input_ids) == printable


def test_what_it_does_not_know_becomes_one_unknown_token() -> None:
    tokenizer = character_tokenizer()
    assert tokenizer("é", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]


def test_the_chat_template_opens_the_assistants_turn() -> None:
    tokenizer = character_tokenizer()
    chat = [{"role": "user", "content": "ones in 5?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|user|>ones in 5?<|assistant|>"
    )
    whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "2"}], tokenize=False)
    assert whole == "<|user|>ones in 5?<|assistant|>2<|end|>"


def test_saved_and_opened_by_transformers_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token) == ("<|end|>", "<|pad|>")
