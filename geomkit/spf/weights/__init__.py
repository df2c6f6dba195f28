"""The weights under guard, behind one interface, ``blocks``.

Plain tensors, rows on one process of several (``sharding``, ``processes``), fp32 master copies, and the products of
``adapters``; ``guarded`` chooses the kind for each parameter.
"""
