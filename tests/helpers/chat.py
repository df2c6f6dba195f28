"""Tokenizers with the chat templates of model families, for tests of what is rendered and scored."""

import re
from importlib import resources

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = re.compile(r"<[|｜/]?[\w▁ ]{2,40}[|｜]?>|\[/?\w{3,20}\]")


def shipped_template(name: str) -> str:
    """Return a chat template that TRL ships."""
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def shipped_templates() -> list[str]:
    """Return the names of the chat templates that TRL ships."""
    folder = resources.files("trl") / "chat_templates"
    return sorted(file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja"))


def byte_tokenizer(
    template: str,
    *,
    bos: str = "<s>",
    eos: str = "</s>",
    rstrip: bool = False,
    merges: tuple[tuple[str, str], ...] = (),
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes and of the special tokens that the template writes: it decodes exactly.

    Args:
        template: A chat template.
        bos: Token at the beginning of a text.
        eos: Token at the end, which is also the pad token.
        rstrip: Whether special tokens swallow the white space behind them, as those of Phi-3.
        merges: Pairs of byte-level symbols that are merged, such as two line feeds.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(text, rstrip=rstrip) for text in sorted({bos, eos, *_SPECIAL.findall(template)})]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=template
    )


def dialogue(*texts: str, system: str | None = None) -> Dataset:
    """Return one conversation whose messages alternate between user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts)]
    return Dataset.from_list([{"messages": [{"role": "system", "content": system}] * bool(system) + messages}])


def scored_texts(tokenizer: PreTrainedTokenizerFast, tokens) -> list[str]:
    """Return the decoded text of every run of scored tokens."""
    runs, before = [], False
    for token, scored in zip(tokens.input_ids, tokens.loss_mask, strict=True):
        if scored and not before:
            runs.append([])
        if scored:
            runs[-1].append(token)
        before = scored
    return [tokenizer.decode(run) for run in runs]
