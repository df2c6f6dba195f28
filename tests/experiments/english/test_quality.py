"""The evaluation of the stages: what is written is what is read, and the card is written from it."""

import pytest

from geomkit.errors import DataError
from geomkit.experiments.english.alignment_rows import Recipe
from geomkit.experiments.english.card import model_card
from geomkit.experiments.english.quality import QUALITY, StageReport, load_quality, write_quality
from geomkit.stats.proportions import Rate

STAGES = (
    StageReport("base", {"AdvBench": Rate(3, 520), "XSTest, safe": Rate(1, 250)}, {"GSM8K": 1.4829}),
    StageReport("aligned", {"AdvBench": Rate(430, 520), "XSTest, safe": Rate(40, 250)}, {"GSM8K": 1.5012}),
)


def test_what_is_written_is_what_is_read(tmp_path):
    write_quality(STAGES, tmp_path)
    assert load_quality(tmp_path) == STAGES


def test_the_card_states_every_figure_beside_its_aim():
    card = model_card(STAGES, Recipe(), seed=0)
    for text in (*(str(stage.refused["AdvBench"]) for stage in STAGES), "1.501", "at least 80 %", "KL(base ‖ adapted)"):
        assert text in card
    assert "{" not in card


@pytest.mark.parametrize("text", ["[]]", '[{"stage": "base"}]', '{"a": 1}', "[1]"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / QUALITY).write_text(text)
    with pytest.raises(DataError, match=r"expected .*quality\.json|expected an evaluation"):
        load_quality(tmp_path)
