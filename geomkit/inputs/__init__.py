"""The inputs of a gradient: conversations, their tokens and batches, control sets, the model, its parameters, the loss.

Reading order: ``messages`` → ``files`` → ``adapters`` → ``examples`` for the conversations, and ``benchmarks`` →
``benchmark_rows`` for public data by name; ``templates`` → ``answer_spans`` → ``token_spans`` → ``marked_spans`` →
``tokens`` → ``batches`` → ``loss`` for their tokens; ``models`` with ``loading_report``, ``parameters``,
``offloading`` and ``model_state`` for the model; ``fits`` checks that the data fit the model; ``copies`` counts
different rows; ``control_sets`` makes the sets that a safety set is compared with.
"""
