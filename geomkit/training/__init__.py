"""Fine-tuning by ``transformers.Trainer``, and the responses of a model and their evaluation.

Reading order: ``finetune`` with its ``arguments``, ``trainer``, ``callbacks``, ``checkpoints`` and ``result``, whose
model ``card`` is saved with it; ``responses`` lets a model answer prompts; ``judges`` decide which responses are
refusals, and ``model_judges`` are models that do; ``metrics`` compare answers with references, and ``losses`` are those
of given answers; ``evaluate`` checks its ``evaluation_sets``, lets ``scoring`` ask judges and metrics about the
responses, and returns an ``evaluation``; ``compare`` tests the differences of several; ``sets_by_text`` reads sets for
the command line.
"""
