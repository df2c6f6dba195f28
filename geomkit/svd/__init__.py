"""Singular values of gradients and their geometry: spectra, ranks, noise floors, subspaces, principal angles.

Reading order: ``eigenpairs``, ``singular_values``, ``singular_vectors`` and ``subspace_iteration`` → ``layer_spectrum``
→ ``left_out`` and ``token_decomposition`` (the spectrum without some examples) → ``layer_measure`` → ``spectrum`` →
``spectrum_contrast``, ``noise_floor`` (with ``weighted_sums``), ``example_span`` → ``subspaces`` →
``principal_angles``. The random gradients of ``nulls`` serve for comparison, and ``token_matching`` gives sets the same
number of tokens. ``one_sample``, which is based on ``common_basis`` and ``leave_one_out_bases``, measures how well the
gradient of one example agrees with the gradient of all.
"""
