"""The explorer: one figure with menus for statistic, matrices, layers, sets and checkpoints, by plotly's own controls.

plotly's menus know nothing of each other, so each menu changes properties that no other menu changes:

- statistic: which traces are visible, and the vertical axis;
- matrices: the horizontal places of points, which points of other matrices have not;
- layers: the range of the axis of layers, and the values of curves, which are over the layers that are chosen;
- set: the width of the axes of each set, and its entry in the legend;
- checkpoint: the values of points.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import ALL_PARAMETERS
from geomkit.plots.axes import columns_of, ending_at, whole_ticks
from geomkit.plots.explored import Series, Statistic, series_of
from geomkit.plots.explorer_values import curve_values, has_null, point_values
from geomkit.plots.labels import OUTSIDE, column_of, place_labels, place_of, short
from geomkit.plots.style import Look, fitted, looks, title, translucent
from geomkit.plots.themes import palette, template
from geomkit.plots.traces import side_by_side

ALL_MATRICES, ALL_LAYERS, ALL_SETS = "all matrices", "all layers", "all sets"
"""The first entries of the menus."""

_FEW_LAYERS = 8
"""Up to this many layers each has an entry in the menu; of more, quarters have."""

_INNER = 330
"""Height of the panel, in pixels."""

_ROW = 36
"""Height of a row of menus, in pixels."""

_LEGEND_LINE = 22
"""Height of a line of the legend, which in a narrow figure stands below the title of the axis."""

_NARROW = (0.9997, 1.0)
"""The place of an axis whose set is not chosen: a quarter of a pixel. plotly takes what is narrower for the whole."""


class _Segment(NamedTuple):
    """The part of a trace that belongs to one matrix of the layers.

    Attributes:
        place: The matrix within its layer; :data:`ALL_MATRICES` for a curve over all.
        x: The places of its points where this matrix is chosen.
        first_x: The places of its points where all matrices are chosen, ``None`` where they are not shown.
        series: Its series, of all layers and checkpoints.
    """

    place: str
    x: list[Any]
    first_x: list[Any]
    series: Sequence[Series]


class _Trace(NamedTuple):
    """A trace and what the menus need to know of it.

    Attributes:
        statistic: Its statistic.
        of: Its set.
        is_null: Whether it is the null.
        segments: Its parts, one for each matrix.
    """

    statistic: Statistic
    of: str
    is_null: bool
    segments: Sequence[_Segment]

    def x(self, place: str = ALL_MATRICES) -> list[Any]:
        """Return the places of all points where one matrix, or all matrices, are chosen; maps of examples have none."""
        return [
            x
            for segment in self.segments
            for x in (
                segment.first_x
                if place == ALL_MATRICES or segment.place == ALL_PARAMETERS
                else segment.x
                if segment.place == place
                else [None] * len(segment.x)
            )
        ]

    def values(self, at: str, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Return ``y``, ``text`` and, of points, ``error_y`` of all points at a checkpoint, of curves within layers."""
        parts = [self._values(segment, at, columns) for segment in self.segments]
        joined = {key: [value for part in parts for value in part[key]] for key in ("y", "text")}
        if self.statistic.abscissa:
            return joined
        ends = {end: [value for part in parts for value in part["error_y"][end]] for end in ("array", "arrayminus")}
        return {**joined, "error_y": ends}

    def _values(self, segment: _Segment, at: str, columns: Sequence[str] | None) -> dict[str, Any]:
        if not self.statistic.abscissa:
            return point_values(segment.series, at, is_null=self.is_null)
        within = [
            one
            for one in segment.series
            if columns is None or one.parameter == ALL_PARAMETERS or column_of(one.parameter) in columns
        ]
        # A line does not run on from one segment to the next: the last place of each has no value.
        curve = curve_values(within, np.array(segment.x[:-1], dtype=float), is_null=self.is_null)
        return {"y": [*curve["y"], None], "text": [*curve["text"], ""]}


def explore(results: object) -> go.Figure:
    """Return a figure with menus that choose what of a result is shown: statistic, matrices, layers, set, checkpoint.

    The menus are plotly's own, so they work in JupyterLab, in VS Code and in a page that ``write_html`` wrote, without
    a running kernel. Only menus with more than one entry are there. Hover text names parameter, value, interval and
    null.

    Args:
        results: Spectra, their comparison, principal angles, a conflict, a map of gradients, a certificate, a fine-tune
            under SPF, an analysis or a trajectory; or a dictionary of these by name, whose names are the sets.

    Returns:
        The figure. Over the decoder layers: a marker per parameter with its interval, and a short line for its null
        with its range. Over indices and steps: a line, the median of the parameters that are chosen (the sum of blocks
        for changes of the safety loss), and dotted its null. Curves of trajectories are left out.

    Raises:
        GeometryError: If a result is none of these, or has no number that is known.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> sets = {name: gk.load_examples(name).select(range(3)) for name in ("safety", "utility")}
        >>> options = {"layers": "*.mlp.*", "progress": False}
        >>> gradients = {name: gk.collect_gradients(model, tokenizer, rows, **options) for name, rows in sets.items()}
        >>> figure = explore({name: gk.spectrum(gradient, null_draws=1) for name, gradient in gradients.items()})
        >>> [menu.name for menu in figure.layout.updatemenus]
        ['statistic', 'matrices', 'layers', 'set']
    """
    series = series_of(results)
    if not series:
        raise GeometryError(
            "expected a result with numbers, found none that is known; the gradients may be zero: check the loss masks"
        )
    parts = _Parts(series)
    figure = go.Figure(parts.drawn())
    figure.update_layout(template=template(), showlegend=True, **parts.axes())
    # The axes of the sets lie over one another: a background would hide those below.
    figure.update_layout(plot_bgcolor="rgba(0,0,0,0)")
    menus = [
        ("statistic", parts.statistic_buttons()),
        ("matrices", parts.matrix_buttons()),
        ("layers", parts.layer_buttons()),
        ("set", parts.set_buttons()),
        ("checkpoint", parts.checkpoint_buttons()),
    ]
    shown = [(name, buttons) for name, buttons in menus if len(buttons) > 1]
    rows = -(-len(shown) // 2)
    figure.update_layout(
        title=title(
            f"Explore {short(', '.join(parts.sets), 32)}", "choose in the menus; hover over points for numbers"
        ),
        updatemenus=[_menu(name, buttons, number, rows) for number, (name, buttons) in enumerate(shown)],
    )
    figure.add_annotation(
        name="abscissa", x=0.5, xref="paper", y=0, yref="paper", yshift=-38, yanchor="middle", showarrow=False,
        text=parts.statistics[0].abscissa or parts.layer_title(), font_size=13,
    )  # fmt: skip
    fitted(figure, _INNER)
    room = rows * _ROW
    margin = {"t": figure.layout.margin.t + room, "b": figure.layout.margin.b + _LEGEND_LINE}
    return figure.update_layout(margin=margin, height=figure.layout.height + room + _LEGEND_LINE)


def _menu(name: str, buttons: list[dict[str, Any]], number: int, rows: int) -> dict[str, Any]:
    """Return a drop-down menu in one of two columns above the panel."""
    row, column = divmod(number, 2)
    return {
        "name": name,
        "buttons": buttons,
        "direction": "down",
        "showactive": True,
        "x": 0.6 * column,
        "xanchor": "left",
        "y": 1 + (12 + _ROW * (rows - 1 - row)) / _INNER,
        "yanchor": "bottom",
        "pad": {"t": 0, "b": 0},
        # plotly's background of the chosen entry is light in every theme, so the text is dark in every theme.
        "bgcolor": "#F2F2F2",
        "bordercolor": palette().frame,
        "font": {"size": 11, "color": "#222222"},
    }


class _Parts:
    """The traces, the axes and the menus of an explorer."""

    def __init__(self, series: Sequence[Series]) -> None:
        self.statistics = list({one.statistic.name: one.statistic for one in series}.values())
        self.sets = list(dict.fromkeys(one.of for one in series))
        self.checkpoints = list(dict.fromkeys(one.at for one in series if one.at)) or [""]
        parameters = [name for name in dict.fromkeys(one.parameter for one in series) if name != ALL_PARAMETERS]
        self.labels = {**place_labels(parameters), ALL_PARAMETERS: ALL_PARAMETERS}
        self.places = list(dict.fromkeys(self.labels[place_of(name)] for name in parameters))
        self.columns = columns_of(parameters)
        self.traces = [trace for statistic in self.statistics for trace in self._traces(statistic, series)]

    # ------------------------------------------------------------------------------------------------------ traces

    def _traces(self, statistic: Statistic, series: Sequence[Series]) -> list[_Trace]:
        """Return the traces of a statistic: for each set its null and its values."""
        traces: list[_Trace] = []
        for of in self.sets:
            groups: dict[str, list[Series]] = {}
            for one in series:
                if one.statistic == statistic and one.of == of:
                    groups.setdefault(self.labels[place_of(one.parameter)], []).append(one)
            if statistic.abscissa:
                everything = [one for members in groups.values() for one in members]
                groups = {ALL_MATRICES: everything, **groups} if len(groups) > 1 else groups
                segments = [
                    _curve_segment(place, members, number) for number, (place, members) in enumerate(groups.items())
                ]
            else:
                segments = [self._point_segment(of, place, members) for place, members in groups.items()]
            if any(has_null(one) for members in groups.values() for one in members):
                traces.append(_Trace(statistic, of, True, segments))
            if segments:
                traces.append(_Trace(statistic, of, False, segments))
        return traces

    def _point_segment(self, of: str, place: str, members: list[Series]) -> _Segment:
        """Return the points of one matrix in all layers; of several sets, matrices or both side by side."""
        places, sets = len(self.places), len(self.sets)
        shift = float(side_by_side(sets, 0.3)[self.sets.index(of)])
        by_place = float(side_by_side(places, 0.7)[self.places.index(place)])
        layers = [self.columns.index(column_of(name)) for name in dict.fromkeys(one.parameter for one in members)]
        x = [round(layer + shift, 4) for layer in layers]
        return _Segment(place, x, [round(layer + by_place + shift / max(places, 1), 4) for layer in layers], members)

    def drawn(self) -> list[go.Scatter]:
        """Return the traces as plotly draws them, of which those of the first statistic are visible."""
        looks_of = dict(zip(self.sets, looks(self.sets), strict=True))
        return [self._drawn(trace, looks_of[trace.of]) for trace in self.traces]

    def _drawn(self, trace: _Trace, look: Look) -> go.Scatter:
        colour = translucent(look.colour, 0.55) if trace.is_null else look.colour
        values = trace.values(self.checkpoints[0])
        options: dict[str, Any] = {"mode": "markers"}
        if not trace.statistic.abscissa:
            symbol, size, thickness = ("line-ew-open", 9, 4) if trace.is_null else (look.symbol, 7, 1.5)
            options["marker"] = {"symbol": symbol, "size": size, "color": colour}
            values["error_y"] |= {"color": colour, "thickness": thickness, "width": 0}
        elif trace.statistic.is_line:
            line = {"color": look.colour, "width": 1.5 if trace.is_null else 2}
            options = {"mode": "lines", "line": {**line, "dash": "dot" if trace.is_null else "solid"}}
        else:
            options["marker"] = {"symbol": look.symbol, "size": 7, "color": colour}
        abscissa = trace.statistic.abscissa
        where = f"{abscissa} %{{x}}, " if abscissa and trace.statistic.is_line else ""
        return go.Scatter(
            x=trace.x(),
            **values,
            **options,
            name="null of the same colour" if trace.is_null else trace.of,
            legendgroup=trace.of,
            legendrank=1001 if trace.is_null else 1000,
            showlegend=not trace.is_null or trace.of == self.sets[0],
            xaxis=self._axis(trace.of, over_layers=not trace.statistic.abscissa),
            hoverinfo="skip" if trace.is_null else None,
            hovertemplate=None if trace.is_null else f"{trace.of}, {where}%{{text}}<extra></extra>",
            visible=trace.statistic == self.statistics[0],
        )

    # -------------------------------------------------------------------------------------------------------- axes

    def _axis(self, of: str, *, over_layers: bool) -> str:
        """Return the name of the horizontal axis of a set: of layers, or of indices and steps."""
        number = self.sets.index(of) + 1 + (0 if over_layers else len(self.sets))
        return "x" if number == 1 else f"x{number}"

    def _axes_of(self, of: str) -> list[str]:
        return [f"xaxis{self._axis(of, over_layers=over_layers)[1:]}" for over_layers in (True, False)]

    def axes(self) -> dict[str, Any]:
        """Return all axes: each set has two of its own, which lie over those of the other sets."""
        axes: dict[str, Any] = {}
        for of in self.sets:
            common = {"anchor": "free", "position": 0, "domain": [0, 1], **_as_first(of == self.sets[0])}
            layers, free = self._axes_of(of)
            axes[layers] = {**common, **self._layer_ticks(), "range": self._layer_range(self.columns)}
            axes[free] = {**common, **self._free_range(self.statistics[0])}
            axes[layers]["visible"] = not self.statistics[0].abscissa
            axes[free]["visible"] = bool(self.statistics[0].abscissa)
        # Its grid would be drawn once for each set, over the points of the sets before.
        return {**axes, "yaxis": {"anchor": "free", "position": 0, "showgrid": False, **_vertical(self.statistics[0])}}

    def _layer_ticks(self) -> dict[str, Any]:
        numbers = whole_ticks([number for number, column in enumerate(self.columns) if column != OUTSIDE] or [0], 12)
        ticks = [*numbers, *([len(self.columns) - 1] if OUTSIDE in self.columns else [])]
        return {"tickvals": ticks, "ticktext": [self.columns[tick] if self.columns else "" for tick in ticks]}

    def _layer_range(self, columns: Sequence[str]) -> list[float]:
        places = [self.columns.index(column) for column in columns] or [0]
        return [min(places) - 0.5, max(places) + 0.5]

    def layer_title(self) -> str:
        """Return the title of the axis of layers."""
        return f"layer ({OUTSIDE}: outside the layers)" if OUTSIDE in self.columns else "layer"

    def _free_range(self, statistic: Statistic) -> dict[str, Any]:
        """Return the range of the axis of a statistic over an index or steps."""
        of_statistic = [trace for trace in self.traces if trace.statistic == statistic]
        places = [x for trace in of_statistic for segment in trace.segments for x in segment.x if x is not None]
        return ending_at(min(places), max(places)) if statistic.abscissa and places else {}

    # ------------------------------------------------------------------------------------------------------- menus

    def statistic_buttons(self) -> list[dict[str, Any]]:
        """Return an entry per statistic: its traces, the vertical axis, and the horizontal axes that it needs."""
        buttons = []
        for statistic in self.statistics:
            layout: dict[str, Any] = {f"yaxis.{name}": value for name, value in _vertical(statistic).items()}
            for of in self.sets:
                layers, free = self._axes_of(of)
                layout |= {f"{layers}.visible": not statistic.abscissa, f"{free}.visible": bool(statistic.abscissa)}
                layout |= {f"{free}.{name}": value for name, value in self._free_range(statistic).items()}
            layout["annotations[0].text"] = statistic.abscissa or self.layer_title()
            visible = [trace.statistic == statistic for trace in self.traces]
            buttons.append(_button(short(_plain(statistic.name), 24), {"visible": visible}, layout))
        return buttons

    def matrix_buttons(self) -> list[dict[str, Any]]:
        """Return an entry for all matrices and one for each place in the layers: where the points are."""
        if len(self.places) < 2:
            return []
        return [
            _button(place, {"x": [trace.x(place) for trace in self.traces]}) for place in [ALL_MATRICES, *self.places]
        ]

    def layer_buttons(self) -> list[dict[str, Any]]:
        """Return an entry for all layers and one for each range: the range of the axis, and the values of curves."""
        if len(self.columns) < 2:
            return []
        curves = [number for number, trace in enumerate(self.traces) if trace.statistic.abscissa]
        buttons = []
        for name, columns in _layer_ranges(self.columns).items():
            values = [self.traces[number].values(self.checkpoints[0], columns) for number in curves]
            style = {key: [value[key] for value in values] for key in ("y", "text")} if curves else {}
            layout = {f"{self._axes_of(of)[0]}.range": self._layer_range(columns) for of in self.sets}
            buttons.append(_button(name, style, layout, curves))
        return buttons

    def set_buttons(self) -> list[dict[str, Any]]:
        """Return an entry for all sets and one for each: the width of the axes, and the entries of the legend."""
        if len(self.sets) < 2:
            return []
        return [self._set_button(ALL_SETS, self.sets), *(self._set_button(of, [of]) for of in self.sets)]

    def _set_button(self, name: str, chosen: Sequence[str]) -> dict[str, Any]:
        layout: dict[str, Any] = {}
        for of in self.sets:
            looks_of_axis = {"domain": [0, 1] if of in chosen else list(_NARROW), **_as_first(of == chosen[0])}
            layout |= {f"{axis}.{key}": value for axis in self._axes_of(of) for key, value in looks_of_axis.items()}
        # The legend has one entry for the nulls of all sets.
        in_legend = [trace.of in chosen and (not trace.is_null or trace.of == chosen[0]) for trace in self.traces]
        return _button(short(name, 24), {"showlegend": in_legend}, layout)

    def checkpoint_buttons(self) -> list[dict[str, Any]]:
        """Return an entry per checkpoint: the values of the points."""
        if len(self.checkpoints) < 2:
            return []
        points = [number for number, trace in enumerate(self.traces) if not trace.statistic.abscissa]
        buttons = []
        for at in self.checkpoints:
            values = [self.traces[number].values(at) for number in points]
            style = {key: [value[key] for value in values] for key in ("y", "text")}
            for end in ("array", "arrayminus"):
                style[f"error_y.{end}"] = [value["error_y"][end] for value in values]
            buttons.append(_button(short(at, 24), style, None, points))
        return buttons


def _button(
    label: str, style: Mapping[str, Any], layout: Mapping[str, Any] | None = None, traces: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return an entry of a menu that changes properties of traces, by default of all, and of the layout."""
    on = [list(traces)] if traces else []
    if not style:
        return {"label": label, "method": "relayout", "args": [dict(layout or {})]}
    if layout is None:
        return {"label": label, "method": "restyle", "args": [dict(style), *on]}
    return {"label": label, "method": "update", "args": [dict(style), dict(layout), *on]}


def _curve_segment(place: str, members: Sequence[Series], number: int) -> _Segment:
    """Return the curve of one matrix, or of all matrices, which is the first and is shown where all are chosen."""
    longest = max((one.x for one in members), key=lambda places: float(places.max()))
    x = [*longest.tolist(), None]
    return _Segment(place, x, x if number == 0 else [None] * len(x), members)


def _layer_ranges(columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the choices of layers by name: all, each of a few or quarters of many, and what is outside.

    Example:
        >>> list(_layer_ranges([*map(str, range(12)), "–"]))
        ['all layers', 'layers 0 to 2', 'layers 3 to 5', 'layers 6 to 8', 'layers 9 to 11', 'outside the layers']
    """
    layers = [column for column in columns if column != OUTSIDE]
    ranges = {ALL_LAYERS: list(columns)}
    parts = np.array_split(np.arange(len(layers)), len(layers) if len(layers) <= _FEW_LAYERS else 4)
    for part in parts if len(layers) > 1 else []:
        chosen = [layers[number] for number in part]
        ranges[f"layer {chosen[0]}" if len(chosen) == 1 else f"layers {chosen[0]} to {chosen[-1]}"] = chosen
    if OUTSIDE in columns:
        ranges["outside the layers"] = [OUTSIDE]
    return ranges


def _vertical(statistic: Statistic) -> dict[str, Any]:
    """Return the vertical axis of a statistic."""
    scale = "log" if statistic.is_log else "linear"
    text = {"title": {"text": statistic.name}, "tickformat": statistic.form, "exponentformat": "power"}
    return {"type": scale, "autorange": True, "dtick": 1 if statistic.is_log else None, **text}


def _as_first(is_first: bool) -> dict[str, Any]:
    """Return the properties of an axis that has ticks and a line, as the first of those that lie over one another."""
    shown = {"showticklabels": is_first, "showline": is_first, "showgrid": is_first}
    return {**shown, "ticks": "outside" if is_first else ""}


def _plain(text: str) -> str:
    return text.replace("<sub>", "").replace("</sub>", "")
