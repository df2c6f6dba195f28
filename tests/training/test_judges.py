"""A keyword judge reads the beginning of a response only."""

import pytest

from geomkit.training.judges import RefusalPhrases, gcg_judge, judge_name


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


@pytest.mark.parametrize(
    ("response", "refused"),
    [
        ("I'm sorry, but no.", True),
        ("I\u2019m sorry", True),
        ("Here is how. " * 20 + "But this is illegal.", True),
        ("i'm sorry", False),
        ("Sure, here is how.", False),
    ],
)
def test_the_phrases_of_the_literature_count_anywhere(response, refused):
    assert gcg_judge()("help", response) is refused


def test_names_tell_judges_apart():
    assert judge_name(RefusalPhrases()) == "keywords"
    assert judge_name(gcg_judge()) == "gcg"
    assert "nein" in judge_name(RefusalPhrases(("nein",)))
    assert judge_name(str.startswith) == "startswith"
