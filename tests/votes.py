"""Votes with known probabilities, and models that know them more or less well."""

import numpy as np


def make_votes(n_pairs, seed=0):
    """True probabilities, and votes drawn by them."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet([1.5, 1.5, 1.5], n_pairs)
    return truth, (rng.random((n_pairs, 1)) > truth.cumsum(axis=1)[:, :-1]).sum(axis=1)


def blur(probs, noise, power=1.0, seed=1):
    logits = power * np.log(probs) + noise * np.random.default_rng(seed).normal(size=probs.shape)
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True)
