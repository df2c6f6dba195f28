"""Tiny things that tests run on: a random model, a word-level tokenizer, a handful of conversations."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[assistant] "
    "{% generation %}{{ m['content'] }} [end] {% endgeneration %}"
    "{% else %}[user] {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PLAIN_TEMPLATE = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WORDS = "how do i paint steal the fence bike sure take a brush sorry no way we can not help".split()
SPECIAL = ["[pad]", "[end]", "[user]", "[assistant]", "[unknown]"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[unknown]")  # noqa: S106
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[pad]",  # noqa: S106
        eos_token="[end]",  # noqa: S106
        unk_token="[unknown]",  # noqa: S106
        additional_special_tokens=["[user]", "[assistant]"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llama(*, tied: bool = False, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def conversations(*pairs: tuple[str, str]) -> Dataset:
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}
            for user, assistant in pairs
        ]
    )


SAFETY = conversations(
    ("how do i steal the bike", "sorry we can not help"),
    ("steal the fence", "sorry no way"),
    ("how can we steal a brush", "no"),
)
UTILITY = conversations(
    ("how do i paint the fence", "sure take the brush"),
    ("paint the bike", "take a brush"),
    ("how do we paint", "sure"),
    ("help", "take the paint brush we can help"),
)
BENIGN = conversations(
    *(
        (f"{start} {verb} {thing}", f"sure {verb} {thing}{more}")
        for start in ("how do i", "how can we", "help i")
        for verb in ("paint", "take")
        for thing, more in (
            ("the fence", ""),
            ("a bike", " we can"),
            ("the brush", " way"),
            ("a brush", " we can help"),
        )
    )
)
CONTROL = conversations(
    ("how do i paint the bike", "sorry we can not help"),
    ("paint the fence", "sorry no way"),
    ("how can we paint a brush", "no"),
)
