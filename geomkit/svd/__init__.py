"""Singular values of gradients and what follows from them: spectra, ranks, noise floors, subspaces, principal angles.

Reading order: ``singular_values`` and ``singular_vectors`` → ``layer_spectrum`` → ``spectrum`` → ``spectrum_contrast``,
``noise_floor``, ``example_span`` → ``subspaces`` → ``principal_angles``; ``nulls`` draws what a number is compared
with, ``token_matching`` makes sets comparable; ``one_sample`` asks how far one example stands for all.
"""
