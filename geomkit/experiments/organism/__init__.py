"""The model organism: a small language model built to refuse forbidden requests, on which experiments are cheap.

A model organism is a model made for experiments, as a fruit fly is for biology: fast to train, and known in every part.

Reading order: ``grammar`` (words) → ``requests`` and ``skills`` (requests with their answers) → ``world`` (training and
held-out requests) → ``scenarios`` and ``sets`` (example sets) → ``tokenizer``, ``training``, ``recipe`` and ``build``
(the two training stages) → ``quality`` and ``card`` (evaluation, model card) → ``load`` (the organism that ships) and
``variants`` (organisms of other seeds), behind the ``interface`` that grids of fine-tunes use.
"""
