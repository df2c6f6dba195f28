"""The weights that a guard protects, behind one interface.

Reading order: ``trained`` tells which parameters the optimizers move; ``blocks`` is the interface, with plain tensors,
fp32 master weights and products of adapters behind it; ``adapters`` tells which layers' adapters are such products;
``sharding`` and ``processes`` serve training in several processes; ``guarded`` chooses the kind of block for each
parameter.
"""
