"""Bars of slow work: hidden while it is short or not wanted, shown with a remaining time otherwise."""

import pytest
import tqdm.auto

from geomkit.utils import progress
from geomkit.utils.progress import slow_bar, with_bar


def test_short_work_shows_nothing(capsys):
    assert list(with_bar(range(3), "encode", "example", True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_long_work_shows_what_it_does_how_far_it_is_and_how_long_it_has(capsys, monkeypatch):
    """Without patience the bar is there at once; every item counts once it has been used."""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    assert list(with_bar(iter("abc"), "encode", "example", True, total=3)) == ["a", "b", "c"]
    shown = capsys.readouterr().err
    assert "encode: 100%" in shown
    assert "3/3" in shown
    assert "example" in shown


@pytest.mark.parametrize("wanted", [True, False])
def test_progress_false_is_honoured(capsys, monkeypatch, wanted):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    with slow_bar(2, "losses", "example", wanted) as bar:
        bar.update(2)
    assert bool(capsys.readouterr().err) is wanted


def test_the_bar_waits_five_seconds(monkeypatch):
    asked = {}
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda **settings: asked.update(settings))
    slow_bar(2, "losses", "example", True)
    assert asked["delay"] == 5
    assert not asked["disable"]
