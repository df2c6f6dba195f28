"""The included training loop and what a trained model answers.

Reading order: ``finetune`` with its ``callbacks`` and ``checkpoints``; ``responses`` lets a model answer; ``evaluate``
measures refusal, over-refusal and skills, with ``judges`` of what a refusal is.
"""
