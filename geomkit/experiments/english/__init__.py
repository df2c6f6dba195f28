"""The English world: SmolLM2-135M-Instruct, a real pretrained chat model, aligned by this project.

Every claim that was measured on the small organism can be measured again on it.

Reading order: ``requests.toml`` (words) → ``requests`` (forbidden requests with benign counterparts) → ``answers``
(refusals, and the answers of the base model itself) → ``sources`` (where the base model and the benchmarks are) →
``sets`` and ``scenarios`` (example sets) → ``alignment_rows``, ``alignment_loss``, ``alignment`` and ``build``
(training of the adapter that ships) → ``quality`` and ``card`` (evaluation, model card) → ``load`` (base and aligned
model) → ``organism`` and ``outcomes`` (what grids of fine-tunes need) → ``course`` (the gradients along the alignment).
"""
