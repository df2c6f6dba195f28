"""SPF: projecting every optimizer step so that it does not conflict with safety, and checking that it does not.

Reading order: ``settings`` are what a user gives; a ``rule`` says how a conflicting step is changed, and ``rules`` is
the table of all rules; ``constraints`` runs the ``anchors`` (with ``kl``) and turns the rule into bounds (``demands``);
``weights`` are the blocks of weights under guard; ``projection`` reads the optimizer's step and corrects it;
``protected`` holds the blocks with their protections; ``utility_gradients`` changes gradients before a step; the
``guard`` does all this around ``optimizer.step`` (``step_calls``), and watches the weights between steps (``watch``);
``guard_group`` are the guards of several optimizers; ``assess`` makes a ``step_record`` of it, for the ``certificate``;
``checkpoint_state`` serves resumed runs, and ``callback`` the Trainer.
"""
