"""The explorer: each entry of each menu changes what is shown, in every combination, and in a browser."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import geomkit as gk
from geomkit.errors import GeometryError
from geomkit.svd.principal_angles import Angles
from geomkit.svd.spectrum import Spectrum
from tests.helpers.figures import LABELS, NAMES, certificate, conflict

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PRESS = (Path(__file__).parents[1] / "helpers" / "press_menus.js").read_text("utf-8")


@pytest.fixture(scope="module")
def spectra(safety: Spectrum, utility: Spectrum) -> go.Figure:
    return gk.explore({"safety": safety, "utility": utility})


def pressed(figure: go.Figure, **entries: str) -> dict[str, Any]:
    """Return a figure as plotly has it after an entry of each named menu was chosen, one after the other."""
    plain = json.loads(figure.to_json())
    for menu, label in entries.items():
        (buttons,) = [found["buttons"] for found in plain["layout"]["updatemenus"] if found["name"] == menu]
        (button,) = [found for found in buttons if found["label"] == label]
        style, layout, traces = arguments(button)
        for path, values in style.items():
            for number, trace in enumerate(traces if traces is not None else range(len(plain["data"]))):
                put(plain["data"][trace], path, values[number % len(values)])
        for path, value in layout.items():
            put(plain["layout"], path, value)
    return plain


def arguments(button: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[int] | None]:
    """Return the changes of traces and of the layout by a button, and the traces that it changes, all if ``None``."""
    args = button["args"]
    if button["method"] == "relayout":
        return {}, args[0], None
    traces = args[-1] if isinstance(args[-1], list) else None
    return args[0], args[1] if button["method"] == "update" else {}, traces


def put(place: dict[str, Any], path: str, value: object) -> None:
    """Set a property of a figure by its path, such as ``xaxis2.range`` or ``annotations[0].text``."""
    *inner, last = path.replace("[0]", ".0").split(".")
    for name in inner:
        place = place[int(name)] if name.isdigit() else place.setdefault(name, {})
    place[last] = value


def shown(plain: Mapping[str, Any]) -> set[tuple[str, float, float]]:
    """Return the points that a figure shows, each with the name of its trace."""
    points = set()
    for trace in plain["data"]:
        axis = plain["layout"]["xaxis" + trace["xaxis"][1:]]
        start, end = axis["domain"]
        if trace["visible"] and axis["visible"] and end - start > 0.5:
            low, high = axis["range"]
            pairs = zip(as_list(trace["x"]), as_list(trace["y"]), strict=True)
            points |= {(trace["name"], x, y) for x, y in pairs if None not in (x, y) and low <= x <= high}
    return points


def as_list(values: Any) -> list[Any]:
    """Return values of a figure that was read from JSON, where plotly writes arrays of numbers in base 64."""
    if isinstance(values, dict):
        return go.Scatter(y=values).y.tolist()
    return list(values)


def labels(figure: go.Figure) -> dict[str, list[str]]:
    return {menu.name: [button.label for button in menu.buttons] for menu in figure.layout.updatemenus}


def test_menus_have_what_there_is_to_choose(spectra: go.Figure, safety: Spectrum) -> None:
    entries = labels(spectra)
    assert list(entries) == ["statistic", "matrices", "layers", "set"]
    assert entries["statistic"][:2] == ["singular values σi/σ1", "energy CER(k)"]
    assert {"effective rank", "stable rank", "CER(10)"} < set(entries["statistic"])
    assert entries["matrices"] == ["all matrices", *LABELS, "head"]
    assert entries["layers"] == ["all layers", "layer 0", "layer 1", "layer 2", "outside the layers"]
    assert entries["set"] == ["all sets", "safety", "utility"]
    assert "set" not in labels(gk.explore(safety))  # nothing to choose


@pytest.mark.parametrize("statistic", ["singular values σi/σ1", "energy CER(k)", "effective rank"])
def test_every_entry_of_every_menu_shows_something_else(spectra: go.Figure, statistic: str) -> None:
    for menu, entries in labels(spectra).items():
        start = {} if menu == "statistic" else {"statistic": statistic}
        figures = [pressed(spectra, **start, **{menu: entry}) for entry in entries]
        assert all(map(shown, figures)), menu
        # CER(10) and CER(20) are both 1 in gradients of 9 tokens: there only the title of the axis differs.
        drawn = [(frozenset(shown(plain)), plain["layout"]["yaxis"]["title"]["text"]) for plain in figures]
        assert len(set(drawn)) == len(entries), menu


def test_menus_do_not_undo_each_other(spectra: go.Figure) -> None:
    entries = {name: chosen[1:3] for name, chosen in labels(spectra).items()}
    entries["statistic"] = ["energy CER(k)", "effective rank"]
    for chosen in product(*entries.values()):
        one_way = dict(zip(entries, chosen, strict=True))
        other_way = dict(reversed(one_way.items()))
        assert shown(pressed(spectra, **one_way)) == shown(pressed(spectra, **other_way))
        again = {name: values[0] for name, values in labels(spectra).items()}
        back = pressed(go.Figure(pressed(spectra, **one_way)), **again)
        assert shown(back) == shown(json.loads(spectra.to_json()))


def test_what_is_chosen_is_what_the_result_says(spectra: go.Figure, utility: Spectrum) -> None:
    points = shown(pressed(spectra, statistic="effective rank", matrices=LABELS[1], layers="layer 2", set="utility"))
    layer = utility.layers[NAMES[5]]
    assert NAMES[5] == "model.layers.2.mlp.up_proj.weight"
    ((_, _, value),) = [point for point in points if point[0] == "utility"]
    assert value == pytest.approx(layer.effective_rank, rel=1e-4)
    ((_, _, null),) = [point for point in points if point[0] != "utility"]
    assert null == pytest.approx(np.mean([draw.effective_rank for draw in utility.null[NAMES[5]]]), rel=1e-4)


def test_a_curve_is_the_median_over_the_layers_that_are_chosen(spectra: go.Figure, safety: Spectrum) -> None:
    chosen = {"statistic": "energy CER(k)", "matrices": LABELS[0], "set": "safety"}
    first, all_layers = (
        {x: y for name, x, y in shown(pressed(spectra, **chosen, layers=layers)) if name == "safety"}
        for layers in ("layer 0", "all layers")
    )
    of_layers = [safety.layers[name].cer(2) for name in NAMES[::2]]
    assert first[2] == pytest.approx(of_layers[0], rel=1e-4)
    assert all_layers[2] == pytest.approx(np.median(of_layers), rel=1e-4)


def test_hover_text_names_parameter_value_interval_and_null(spectra: go.Figure) -> None:
    plain = pressed(spectra, statistic="effective rank")
    texts = [text for trace in plain["data"] if trace["visible"] and "hovertemplate" in trace for text in trace["text"]]
    assert len(texts) == 14
    assert any(text.startswith(f"{NAMES[0]}<br>effective rank <b>") and "<br>null " in text for text in texts)
    drawn = gk.explore(conflict())
    points = pressed(drawn, statistic="cosine with utility")["data"]
    (values,) = [trace for trace in points if trace["visible"] and "hovertemplate" in trace]
    assert f"{NAMES[0]}<br>cosine with utility <b>0.05</b> [-0.05, 0.15]<br>null 0" in values["text"]
    assert values["error_y"]["array"]


def test_principal_angles_certificates_and_maps_can_be_explored(angles: Angles) -> None:
    in_degrees = gk.explore(angles)
    assert labels(in_degrees)["statistic"][0] == "angles, degrees"
    first = {y for name, _, y in shown(json.loads(in_degrees.to_json())) if name == "safety"}
    degrees = np.median([np.degrees(layer.angles[::-1]) for layer in angles.layers.values()], axis=0)
    np.testing.assert_allclose(sorted(first), degrees, rtol=1e-4)
    runs = gk.explore({"SFT": certificate(), "SPF": certificate(violated=True)})
    assert labels(runs)["set"] == ["all sets", "SFT", "SPF"]
    drawn = sorted((x, y) for name, x, y in shown(json.loads(runs.to_json())) if name == "SFT")
    np.testing.assert_allclose(drawn, [(1, -1e-4), (2, -1e-4)])  # the sum over both blocks
    plane = gk.gradient_map({"a": 3, "b": 4}, torch.diag(torch.arange(1.0, 8.0)), draws=9)
    assert len(shown(json.loads(gk.explore(plane).to_json()))) == 7


def test_checkpoints_change_the_values_of_points(safety: Spectrum, angles: Angles) -> None:
    other = conflict()
    lower = {name: replace(layer, cosine=layer.cosine - 1) for name, layer in other.layers.items()}
    moments = {
        step: SimpleNamespace(analysis=analysis(safety, angles, measured))
        for step, measured in ((0, other), (10, replace(other, layers=lower)))
    }
    figure = gk.explore(type("Trajectory", (), {"moments": moments})())
    assert labels(figure)["checkpoint"] == ["0", "10"]
    before, after = (
        sorted(shown(pressed(figure, statistic="cosine of the means", checkpoint=at))) for at in ("0", "10")
    )
    changes = [later[2] - earlier[2] for earlier, later in zip(before, after, strict=True) if earlier[0] == "safety"]
    assert changes == pytest.approx([-1] * 7)
    assert "singular values" not in str(labels(figure)["statistic"])


def analysis(spectrum: Spectrum, angles: Angles, measured: object) -> SimpleNamespace:
    return SimpleNamespace(spectra={"safety": spectrum}, conflict=measured, angles=angles)


def test_sets_of_two_models_are_kept_apart(safety: Spectrum, utility: Spectrum) -> None:
    figure = gk.explore({"base": {"safety": safety}, "aligned": {"safety": utility}})
    assert labels(figure)["set"] == ["all sets", "base: safety", "aligned: safety"]


def test_what_cannot_be_explored_is_refused() -> None:
    with pytest.raises(GeometryError, match="or a dict of these by name, found a list"):
        gk.explore([1])
    with pytest.raises(GeometryError, match="at least one result to explore"):
        gk.explore({})
    run = type("FineTuneResult", (), {"certificate": None})()
    with pytest.raises(GeometryError, match='found one without SPF; give SPF\\(rule="monitor"\\)'):
        gk.explore(run)


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_every_entry_changes_what_a_browser_draws(spectra: go.Figure, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    html = spectra.to_html(include_plotlyjs=True)
    page.write_text(html.replace("</body>", f"<script>{PRESS}</script></body>"), "utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(  # noqa: S603 - our own page
        [*command, "--virtual-time-budget=600000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    _, _, report = done.stdout.partition('<pre id="pressed">')
    menus = json.loads(report.partition("</pre>")[0])
    expected = labels(spectra)
    assert [[label for label, *_ in entries] for entries in menus] == list(expected.values())
    for name, entries in zip(expected, menus, strict=True):
        drawn = [(length, number) for _, length, number in entries]
        assert min(length for length, _ in drawn) > 100, name
        assert len(set(drawn)) == len(drawn), name
        assert drawn[0] == (menus[0][0][1], menus[0][0][2])  # the first entries are what is drawn at the start
