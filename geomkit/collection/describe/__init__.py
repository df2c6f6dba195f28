"""Description of a collection, and predictions of what it, an analysis and a fine-tune need, before they run.

``describe`` makes a ``description``, with sizes of gradients from ``memory``. Where predictions are asked for,
``prediction`` adds up tasks, from passes on tensors without values (``simulation``) and the device's ``speed``.
"""
