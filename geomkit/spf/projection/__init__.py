"""The projection of one step.

Reading order: ``protection`` of each block; ``reading`` before and after the step; ``removal`` of a subspace, and the
part of a gradient ``outside`` it; ``nearest`` step that satisfies the constraints; ``corrections`` of the weights.
"""
