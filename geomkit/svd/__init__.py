"""Singular values of gradients and their geometry: spectra, ranks, noise floors, subspaces, principal angles.

Reading order: ``singular_values`` and ``singular_vectors`` → ``layer_spectrum`` → ``spectrum`` → ``spectrum_contrast``,
``noise_floor`` (with ``weighted_sums``), ``example_span`` → ``subspaces`` → ``principal_angles``. The random gradients
of ``nulls`` serve for comparison, ``token_matching`` makes sets comparable. ``one_sample``, on ``common_basis``, asks
how well one example stands for all.
"""
