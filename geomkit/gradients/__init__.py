"""The gradients as values: four forms of one layer's gradient, arithmetic between them, and the set of a whole model.

Reading order: ``layer_gradient`` is what all forms share, ``factored``, ``indexed``, ``dense`` and ``summed`` are the
forms; ``arithmetic`` has inner products and sums; ``gradient_set`` holds a model's gradients with their ``provenance``;
``storage`` loads what was saved.
"""
