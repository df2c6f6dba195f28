"""The figure of tokens does not read tokens as mark-up."""

import numpy as np

from geomkit import plots
from geomkit.correlation.token_conflict import ExampleTokens, TokenConflict


def test_tokens_are_no_mark_up() -> None:
    texts = ("<|end|>", "&lt;", "a")
    values = np.array([[-0.2, 0.1, 0.3], [-0.1, 0.2, 0.1]])
    examples = tuple(ExampleTokens((0, 1, 2), texts, np.ones(3, bool), np.ones(3), row) for row in values)
    figure = plots.plot_token_conflict(TokenConflict(examples, 1.0, confidence=0.9))
    assert {row[0] for drawn in figure.data for row in drawn.customdata} == {"&lt;|end|&gt;", "&amp;lt;", "a"}
    assert "&lt;|end|&gt; ×2" in figure.layout.yaxis.ticktext
    assert "mean over 2 examples; lines: 90 % intervals" in figure.layout.title.subtitle.text
