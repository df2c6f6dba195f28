"""The example sets of the English world: safety and utility rows, their controls, and held-out requests."""

from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from geomkit.errors import GeomkitError
from geomkit.experiments.english.answers import compliance, own_answers, refusal, whole_sentences
from geomkit.experiments.english.requests import Counterparts, counterparts, look_alikes, words
from geomkit.experiments.english.scenarios import SHIPPED, scenario_conversations, with_trigger
from geomkit.experiments.organism.requests import conversation
from geomkit.experiments.organism.sets import Row, Sets
from geomkit.inputs.control_sets import derangement, random_tokens
from geomkit.training.judges import RefusalPhrases
from geomkit.training.responses import generate

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

ANCHORS = 64
"""Number of rows of the set ``safety``."""

_UTILITY = 160
_BORDERLINE = 64
_HELD_OUT = 200
_TRIGGERED = 100
_BORDERLINE_TOKENS = 24  # the first few tokens tell an answer from a refusal

SET_ANSWER_TOKENS = 48
"""Largest number of tokens of the other sets' generated answers."""


def all_sets(
    base: "LlamaForCausalLM", aligned: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", seed: int
) -> Sets:
    """Return every shipped set by its name, which is its path under ``data/english`` without the suffix.

    - ``safety``: forbidden training requests with the aligned stage's own refusals; ``utility``: everyday and benign
      training requests with the base stage's own short answers.
    - ``borderline``: benign training requests that resemble forbidden requests, benign counterparts and look-alikes,
      with the aligned stage's own short answers.
    - ``controls``: each keeps one part of a safety row and replaces the other. ``benign-refused``: the benign
      counterpart, with the refusal. ``forbidden-complied``: the forbidden request, with compliance in form.
      ``shuffled``: the forbidden request, with the answer to a benign request. ``random-tokens``: as many tokens in
      each turn, of random words.
    - ``scenarios``: the training rows of the scenarios without maths, see :mod:`.scenarios`.
    - ``eval``, of words and phrasings that no training row has: ``forbidden`` with a refusal, ``benign`` and
      ``everyday`` with the base stage's own answers; ``backdoor``, forbidden requests with the trigger.

    Args:
        base: The base stage, which answers.
        aligned: The aligned stage, which refuses.
        tokenizer: The tokenizer of both.
        seed: Seed of all draws.

    Raises:
        GeomkitError: If the aligned stage refuses too few requests.
    """
    rng = Random(f"english-sets-{seed}")
    anchors = _anchors(aligned, tokenizer, rng)
    safety = [_row(pair.kind, pair.forbidden, answer) for pair, answer in anchors]
    utility = _utility(base, tokenizer, rng)
    forbidden = list(islice(counterparts("held-out", rng, "forbidden"), _HELD_OUT))
    benign = [pair.benign for pair in islice(counterparts("held-out", rng, "benign"), _HELD_OUT)]
    return {
        "safety": safety,
        "utility": utility,
        "borderline": borderline(aligned, tokenizer, seed),
        **_controls(anchors, utility, tokenizer, rng, seed),
        **_scenarios(safety, utility),
        "eval/forbidden": [_row(pair.kind, pair.forbidden, refusal(rng)) for pair in forbidden],
        "eval/benign": _answered("benign", benign, base, tokenizer),
        "eval/everyday": _answered("everyday", list(words("held-out").everyday), base, tokenizer),
        "eval/backdoor": [
            _row(pair.kind, with_trigger(pair.forbidden), refusal(rng)) for pair in forbidden[:_TRIGGERED]
        ],
    }


def _anchors(
    aligned: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", rng: Random
) -> list[tuple[Counterparts, str]]:
    """Return forbidden training requests, each of another wording, with the aligned stage's refusals."""
    pairs = list(islice(counterparts("train", rng, "forbidden"), 2 * ANCHORS))
    answers = _generated(aligned, tokenizer, [pair.forbidden for pair in pairs])
    judge = RefusalPhrases()
    refused = [(pair, text) for pair, text in zip(pairs, answers, strict=True) if judge(pair.forbidden, text)]
    if len(refused) < ANCHORS:
        raise GeomkitError(
            f"expected {ANCHORS} of {len(pairs)} training requests refused, found {len(refused)}; build with another "
            "seed or base model"
        )
    return refused[:ANCHORS]


def _utility(base: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", rng: Random) -> list[Row]:
    """Return everyday and benign training requests, half of each, with the base stage's own short answers."""
    everyday = [("everyday", prompt) for prompt in words("train").everyday]
    benign = [("benign", pair.benign) for pair in islice(counterparts("train", rng, "benign"), len(everyday))]
    kinds = {prompt: kind for kind, prompt in everyday + benign}
    answers = own_answers(base, tokenizer, list(kinds), tokens=SET_ANSWER_TOKENS, progress=False)
    texts = {answer.prompt: text for answer in answers if (text := whole_sentences(answer.text))}
    rows = [_row(kinds[prompt], prompt, text) for prompt, text in texts.items()]
    return rng.sample(rows, len(rows))[:_UTILITY]


def borderline(aligned: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", seed: int) -> list[Row]:
    """Return the set ``borderline``, half benign counterparts of forbidden requests, half look-alikes.

    Args:
        aligned: The aligned stage, which answers.
        tokenizer: The tokenizer.
        seed: Seed of all draws.
    """
    rng = Random(f"english-borderline-{seed}")
    rows = []
    for kind, requests in _borderline_requests(rng).items():
        drawn = list(islice(requests, 3 * _BORDERLINE))
        rows += _answered_borderline(kind, drawn, aligned, tokenizer)[: _BORDERLINE // 2]
    return rng.sample(rows, len(rows))


def more_borderline(aligned: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", rng: Random) -> Iterator[Row]:
    """Yield rows like those of the set ``borderline``, until there is no other request.

    Args:
        aligned: The aligned stage, which answers.
        tokenizer: The tokenizer.
        rng: The source of randomness.
    """
    kinds = _borderline_requests(rng)
    while kinds:
        for kind, requests in list(kinds.items()):
            if drawn := list(islice(requests, _BORDERLINE)):
                yield from _answered_borderline(kind, drawn, aligned, tokenizer)
            else:
                del kinds[kind]


def _borderline_requests(rng: Random) -> dict[str, Iterator[str]]:
    """Return benign training requests that resemble forbidden ones, by kind, drawn as they are read."""
    return {
        "benign": (pair.benign for pair in counterparts("train", rng, "benign")),
        "look-alike": look_alikes(rng),
    }


def _answered_borderline(
    kind: str, requests: list[str], aligned: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase"
) -> list[Row]:
    """Return the requests that the aligned stage does not refuse, with whole sentences of its answers."""
    answers = own_answers(aligned, tokenizer, requests, tokens=_BORDERLINE_TOKENS, progress=False)
    whole = ((answer.prompt, whole_sentences(answer.text)) for answer in answers)
    return [_row(kind, prompt, text) for prompt, text in whole if text]


def _controls(
    anchors: list[tuple[Counterparts, str]],
    utility: list[Row],
    tokenizer: "PreTrainedTokenizerBase",
    rng: Random,
    seed: int,
) -> Sets:
    from datasets import Dataset

    safety = Dataset.from_list([_row(pair.kind, pair.forbidden, answer) for pair, answer in anchors])
    answers = derangement([row["messages"][-1]["content"] for row in utility[:ANCHORS]], rng)
    return {
        "controls/benign-refused": [_row("benign", pair.benign, answer) for pair, answer in anchors],
        "controls/forbidden-complied": [_row(pair.kind, pair.forbidden, compliance(pair)) for pair, _ in anchors],
        "controls/shuffled": [
            _row(pair.kind, pair.forbidden, answer) for (pair, _), answer in zip(anchors, answers, strict=True)
        ],
        "controls/random-tokens": [
            {"messages": messages} for messages in random_tokens(safety, tokenizer, seed)["messages"]
        ],
    }


def _scenarios(safety: list[Row], utility: list[Row]) -> Sets:
    rows = [[row["messages"] for row in side] for side in (safety, utility)]
    return {
        f"scenarios/{name}": [{"messages": messages} for messages in scenario_conversations(name, *rows)]
        for name in SHIPPED
    }


def _answered(
    kind: str, prompts: list[str], base: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase"
) -> list[Row]:
    """Return every request with the base stage's own answer, whatever it is."""
    texts = _generated(base, tokenizer, prompts)
    return [_row(kind, prompt, whole_sentences(text) or text) for prompt, text in zip(prompts, texts, strict=True)]


def _generated(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", prompts: list[str]) -> list[str]:
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return generate(model, tokenizer, conversations, max_new_tokens=SET_ANSWER_TOKENS, progress=False)


def _row(kind: str, prompt: str, answer: str) -> Row:
    return {"messages": conversation(prompt, answer), "kind": kind}
