"""The inputs of a gradient: conversations, their tokens and batches, control sets, the model, its parameters, the loss.

Reading order: ``examples`` → ``tokens`` → ``batches`` → ``loss`` for the data; ``models`` with ``loading_report``,
``parameters`` and ``model_state`` for the model; ``fits`` checks that the data fit the model; ``control_sets`` makes
the sets that a safety set is compared with.
"""
