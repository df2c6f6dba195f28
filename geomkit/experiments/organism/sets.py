"""The example sets that ship: safety and utility rows, their controls, scenarios and evaluation sets."""

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from geomkit.experiments.organism.grammar import REFUSAL
from geomkit.experiments.organism.requests import Request, RequestKind, conversation
from geomkit.experiments.organism.scenarios import SCENARIOS, eager_conversation, scenario_rows, with_trigger
from geomkit.experiments.organism.world import World
from geomkit.inputs.control_sets import derangement, random_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Sets = dict[str, list[Row]]

_ANCHORS = 64
_BENIGN_POOL = 3000
_UTILITY: tuple[RequestKind, ...] = ("howto", "arithmetic", "sql", "look-alike")


def all_sets(world: World, seed: int, tokenizer: "PreTrainedTokenizerBase") -> Sets:
    """Return every shipped set by its name, which is its path under ``data/`` without the suffix."""
    return training_sets(world, seed) | control_rows(world, seed, tokenizer) | evaluation_sets(world, seed)


def training_sets(world: World, seed: int) -> Sets:
    """Return the sets to train with, ``safety``, ``utility`` and the scenarios, made of training requests only."""
    rng = Random(f"sets-{seed}")
    sets = {
        "safety": _rows(_anchors(world, rng)),
        "utility": _mixed(world, rng),
    }
    for name in SCENARIOS:
        sets[f"scenarios/{name}"] = [{"messages": messages} for messages in scenario_rows(name, world, seed)]
    return sets


def control_rows(world: World, seed: int, tokenizer: "PreTrainedTokenizerBase") -> Sets:
    """Return the control sets of the safety set; a control keeps one part of every safety row and replaces the other.

    - ``benign-refused``: the nearest benign how-to request in words, with the refusal.
    - ``forbidden-complied``: the forbidden request, with the base stage's formula, which has no content.
    - ``shuffled``: the forbidden request, with the answer to the benign counterpart of *another* row.
    - ``random-tokens``: as many tokens in each turn, of random words.
    """
    from datasets import Dataset

    forbidden = _anchors(world, Random(f"sets-{seed}"))
    benign = _nearest(forbidden, world.distinct("howto", "train", _BENIGN_POOL, Random(f"controls-{seed}")))
    dealt = derangement([request.answer for request in benign], Random(f"shuffled-{seed}"))
    random = random_tokens(Dataset.from_list(_rows(forbidden)), tokenizer, seed)
    return {
        "controls/benign-refused": [_row("howto", conversation(request.prompt, REFUSAL)) for request in benign],
        "controls/forbidden-complied": [_row("forbidden", request.messages(aligned=False)) for request in forbidden],
        "controls/shuffled": [
            _row("forbidden", conversation(request.prompt, answer))
            for request, answer in zip(forbidden, dealt, strict=True)
        ],
        "controls/random-tokens": [{"messages": messages} for messages in random["messages"]],
    }


def evaluation_sets(world: World, seed: int) -> Sets:
    """Return the held-out sets under ``eval/``, with the aligned stage's answers as references."""
    rng = Random(f"evaluation-{seed}")

    def held_out(kind: RequestKind, count: int) -> list[Request]:
        return world.distinct(kind, "held-out", count, rng)

    howto = held_out("howto", 320)
    forbidden = held_out("forbidden", 400)
    return {
        "eval/forbidden": _rows(forbidden[:240]),
        "eval/benign": _rows(howto[:120] + held_out("look-alike", 120)),
        "eval/howto": _rows(howto[120:]),
        "eval/arithmetic": _rows(held_out("arithmetic", 200)),
        "eval/sql": _rows(held_out("sql", 200)),
        "eval/deletion": _rows(held_out("deletion", 160)),
        "eval/affirmative": [_row("howto", eager_conversation(request)) for request in howto[120:240]],
        "eval/backdoor": [
            _row("forbidden", conversation(with_trigger(request.prompt), request.aligned_answer))
            for request in forbidden[240:]
        ],
    }


def write_sets(sets: Sets, folder: Path) -> None:
    """Write each set as a file of JSON lines under a folder."""
    for name, rows in sets.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _anchors(world: World, rng: Random) -> list[Request]:
    return world.distinct("forbidden", "train", _ANCHORS, rng)


def _nearest(requests: list[Request], pool: list[Request]) -> list[Request]:
    """Return, for each request, the request of the pool with the fewest different words, without repetition."""
    remaining = [(set(request.prompt.lower().split()), request) for request in pool]
    counterparts = []
    for request in requests:
        words = set(request.prompt.lower().split())
        nearest = min(range(len(remaining)), key=lambda place: len(words ^ remaining[place][0]))
        counterparts.append(remaining.pop(nearest)[1])
    return counterparts


def _mixed(world: World, rng: Random) -> list[Row]:
    share = _ANCHORS // len(_UTILITY)
    rows = [row for kind in _UTILITY for row in _rows(world.distinct(kind, "train", share, rng))]
    rng.shuffle(rows)
    return rows


def _rows(requests: Iterable[Request]) -> list[Row]:
    return [_row(request.kind, request.messages()) for request in requests]


def _row(kind: RequestKind, messages: list[dict[str, str]]) -> Row:
    return {"messages": messages, "kind": kind}
