"""How results show themselves in a notebook: a heading and a short table."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def html_table(title: str, frame: "pd.DataFrame", *, rows: int = 12) -> str:
    """Render a heading and the first rows of a frame as HTML, with numbers to four significant digits."""
    shown = frame.head(rows).to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}")
    more = f"<p>… {len(frame) - rows} more rows: <code>.to_frame()</code></p>" if len(frame) > rows else ""
    return f"<div><p><b>{title}</b></p>{shown}{more}</div>"
