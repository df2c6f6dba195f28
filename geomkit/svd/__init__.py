"""Singular values of gradients and their geometry: spectra, ranks, noise floors, subspaces, principal angles.

Reading order: ``singular_values`` and ``singular_vectors`` → ``layer_spectrum`` → ``spectrum`` → ``spectrum_contrast``,
``noise_floor`` (with ``weighted_sums``), ``example_span`` → ``subspaces`` → ``principal_angles``. The random gradients
of ``nulls`` serve for comparison, and ``token_matching`` gives sets the same number of tokens. ``one_sample``, which is
based on ``common_basis``, measures how well the gradient of one example agrees with the gradient of all.
"""
