"""Judges that are models: causal language models, sequence classifiers, and endpoints that speak OpenAI's protocol.

Reading order: ``rubrics`` says what a judge is asked and how its answer is read, ``presets`` has the rubrics by name;
``rubric_judge`` asks and reads; ``language_models`` and ``endpoints`` answer; ``classifiers`` decide by labels;
``by_name`` makes a judge of a text, for the command line.
"""
