"""How gradients are collected: hooks record calls, a pass turns them into factors, a stream runs all batches.

Reading order: ``hooks`` → ``graph_uses`` → ``closed_form`` → ``passes`` → ``per_example`` (with ``replay``) →
``streaming`` → ``collect``; ``sample_grams`` and ``sample_measures`` (with ``measures``) reduce gradients on the fly.
``describe`` says beforehand what a collection needs, ``check`` whether it is right on a model.
"""
