"""A keyword judge reads the beginning of a response only."""

import pytest

from geomkit.training.judges import RefusalPhrases


@pytest.mark.parametrize(
    ("response", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m SORRY", True),
        ("Sure. " + "First you take a brush. " * 4 + "I cannot say more.", False),
        ("Sure, take a brush.", False),
        ("", False),
    ],
)
def test_a_refusal_opens_with_a_phrase(response, refused):
    assert RefusalPhrases()("help", response) is refused


def test_phrases_can_be_given():
    assert RefusalPhrases(("nein",), within=6)("help", "Nein!")
    assert not RefusalPhrases(("nein",), within=6)("help", "Ach, nein!")
