"""Bars of the public functions: with ``progress=False`` there is none, else each has a short title and a total."""

import pytest
import torch

import geomkit as gk
from geomkit.utils import progress as module
from tests.helpers.tiny import BENIGN, SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def attached(progress):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gk.SPF(SAFETY, rule="mixed-left", benign=UTILITY).attach(model, optimizer, TOKENIZER, progress=progress).detach()


def evaluated(progress):
    skills = {"skill": UTILITY}
    gk.evaluate(tiny_llama(), TOKENIZER, skills=skills, metrics={"skill": "perplexity"}, progress=progress)


def fine_tuned(progress):
    gk.finetune(tiny_llama(), TOKENIZER, UTILITY, gk.SPF(SAFETY), steps=1, progress=progress)


def sets():
    return [
        gk.collect_gradients(tiny_llama(), TOKENIZER, rows, per_sample=True, form="factored", progress=False)
        for rows in (SAFETY, UTILITY)
    ]


def measured(progress):
    safety, utility = sets()
    gk.spectrum(safety, progress=progress)
    gk.subspace(safety, rank=1, progress=progress)
    gk.one_sample_study(safety, utility, rank=1, progress=progress)
    gk.overlaps({"safety": safety, "utility": utility}, rank=1, progress=progress)
    four = gk.load_examples([*SAFETY.to_list(), UTILITY[0]], progress=False)
    gradients = gk.collect_gradients(tiny_llama(), TOKENIZER, four, per_sample=True, form="factored", progress=False)
    gk.anchor_curve(gradients, rank=1, draws=2, progress=progress)


CALLS = {
    "geometry": (measured, ["spectra", "subspaces", "one sample", "overlaps", "anchor curve"]),
    "attach": (attached, ["encode", "anchors before", "benign before"]),
    "load_examples": (lambda progress: gk.load_examples("safety", progress=progress), ["read", "load"]),
    "encode": (lambda progress: gk.encode(TOKENIZER, UTILITY, progress=progress), ["encode"]),
    "evaluate": (evaluated, ["encode", "skill"]),
    "finetune": (fine_tuned, ["encode", "anchors before", "fine-tune"]),
    "sample_grams": (
        lambda progress: gk.sample_grams(tiny_llama(), TOKENIZER, UTILITY, progress=progress),
        ["encode", "gradients", "inner products"],
    ),
    "collect_gradients": (
        lambda progress: gk.collect_gradients(tiny_llama(), TOKENIZER, UTILITY, progress=progress),
        ["encode", "gradients"],
    ),
    "screen": (
        lambda progress: gk.screen(tiny_llama(), TOKENIZER, UTILITY, SAFETY, benign=BENIGN, progress=progress),
        ["encode", "gradients", "screen", "null"],
    ),
    "describe": (
        lambda progress: gk.describe(tiny_llama(), TOKENIZER, UTILITY, predict=True, progress=progress),
        ["encode", "speed", "rehearse"],
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_bars(call, capsys, monkeypatch):
    """Without patience, bars of slow work are there at once."""
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    run, titles = CALLS[call]
    run(False)
    assert capsys.readouterr().err == ""
    run(True)
    shown = capsys.readouterr().err
    for title in titles:
        assert f"{title}:" in shown
        assert len(title) <= 16
