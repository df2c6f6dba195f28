"""Gradients as values: the forms of a parameter's gradient, their arithmetic, and the gradients of a whole model.

Reading order: ``layer_gradient`` defines what all forms have in common; ``factored``, ``indexed``, ``dense`` and
``summed`` are the forms; ``arithmetic`` has inner products, ``batch_products`` those within a batch, ``projections``
projections and ``accumulator`` sums; ``gradient_set`` holds the gradients of a model, with their ``provenance``;
``checks`` refuses wrong arguments, and ``copies`` samples that are copies of each other; ``storage`` loads saved
gradients.
"""
