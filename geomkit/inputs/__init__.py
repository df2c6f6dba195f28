"""The inputs of a gradient: conversations, their tokens and batches, control sets, the model, its parameters, the loss.

Reading order: ``examples`` → ``tokens`` → ``batches`` → ``loss`` for the data; ``models``, ``parameters`` and
``model_state`` for the model; ``control_sets`` makes the sets that a safety set is compared with.
"""
