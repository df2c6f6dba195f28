"""Conflict between safety and utility gradients: cosines, contributions of singular directions, and of tokens.

Reading order: ``cosine`` → ``layer_conflict`` and ``negative_share`` → ``conflict``; ``conflict_directions`` splits a
conflict by singular direction, ``token_conflict`` (with ``token_derivatives``) by token.
"""
