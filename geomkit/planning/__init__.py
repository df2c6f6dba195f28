"""Description of a collection, and predictions of what it, an analysis and a fine-tune need, before they run.

``describe`` makes a ``description``. Where predictions are asked for, ``prediction`` adds up tasks: passes on tensors
without values (``simulation``) at the device's ``speed``, and the work on gradients, which is done once for each shape
of the model on random gradients (``random_gradients``, ``rehearsal``).
"""
