"""The conflict of safety and utility gradients: cosines, the directions that carry them, the tokens behind them.

Reading order: ``cosine`` → ``layer_conflict`` and ``negative_shares`` → ``conflict``; ``conflict_directions`` splits a
conflict by singular direction, ``token_conflict`` (with ``token_derivatives``) by token.
"""
