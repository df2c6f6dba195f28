"""Collection of gradients: hooks record module calls, passes turn them into gradients, streams run over all batches.

Reading order: ``target`` (the parameters that are collected) → ``hooks`` → ``graph_uses`` → ``closed_form`` →
``passes`` → ``per_example`` (with ``replay``) → ``streaming`` → ``collect`` (with ``exchange`` between processes).
``sample_grams`` and ``sample_measures`` (with ``measures``) reduce the gradients of single examples in one pass.
``memory`` bounds what they take; ``check`` tests whether a collection is right on a model.
"""
