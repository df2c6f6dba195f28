"""What a gradient is computed from: examples, their tokens and batches, control sets, a model, its parameters, a loss.

Reading order: ``examples`` → ``tokens`` → ``batches`` → ``loss``; ``models``, ``parameters`` and ``model_state`` are
the model's side; ``control_sets`` makes the examples that a measure is compared with.
"""
