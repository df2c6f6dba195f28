"""SPF: keeping a fine-tuning step from conflicting with safety, and proving that it does.

The way of a step, which is also the reading order: ``settings`` are what a user gives; ``rules`` say what is asked;
``constraints`` runs the ``anchors`` and turns the rule into numbers (``demands``); ``weights`` are the blocks of
weights
that are guarded; ``projection`` reads what the optimizer's step did and corrects it; the ``guard`` does all this around
``optimizer.step``, and ``assess`` makes of it a ``step_record`` in the ``certificate``.
"""
