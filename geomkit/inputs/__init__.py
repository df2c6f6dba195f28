"""The inputs of a gradient: conversations, their tokens and batches, control sets, the model, its parameters, the loss.

Reading order: ``examples`` → ``tokens`` → ``batches`` → ``loss`` for the data, and ``benchmarks`` → ``benchmark_rows``
for public data by name; ``models``, ``parameters`` and ``model_state`` for the model; ``control_sets`` makes the sets
that a safety set is compared with.
"""
