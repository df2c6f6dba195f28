"""Fine-tuning by ``transformers.Trainer``, and the responses of a model and their evaluation.

Reading order: ``finetune`` with its ``arguments``, ``callbacks``, ``checkpoints`` and ``result``; ``responses`` lets a
model answer prompts; ``judges`` decide which responses are refusals; ``evaluate`` counts refusals and exact answers.
"""
