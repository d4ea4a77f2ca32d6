"""Clusters of equal size, which stand in for the classes of a target whose labels are unknown.

Nothing but k-means, on directions, whose assignment is an optimal transport: without the balance a few large clusters
take in what is hard to tell apart (Asano et al., 2020, Self-labelling via simultaneous clustering and representation
learning).

Shape letters: N rows, D dimensions, K clusters.
"""

from __future__ import annotations

import math

import numpy as np
from sklearn.cluster import kmeans_plusplus

from dckt_trainer.linear.basis import Matrix

BLUR = 0.05  # of the transport; cosines that differ by less hardly tell two clusters apart
SCALINGS = 30  # of rows and columns in turn; more change nothing that matters
ROUNDS = 20  # of assigning and averaging
STARTS = 5


def default_clusters(pairs: int) -> int:
    """2 sqrt(N), at most N: too many clusters cost little, too few cost much."""
    return min(pairs, round(2 * math.sqrt(pairs)))


def find_clusters(rows: Matrix, count: int) -> Matrix:
    """Prototypes (K, D) of length 1, of rows (N, D) of length 1; the same rows give the same prototypes."""
    _, best = max((_from_start(rows, count, start) for start in range(STARTS)), key=lambda found: found[0])
    return best


def balanced(scores: Matrix, blur: float = BLUR) -> Matrix:
    """Each row's shares in the clusters, (N, K), all clusters of the same size.

    The shares Q maximise sum(Q scores) + blur entropy(Q), where each row of Q sums to 1 and each column to N / K
    (Sinkhorn's algorithm): Q = diag(a) exp(scores / blur) diag(b).
    """
    count, clusters = scores.shape
    shares: Matrix = np.exp((scores - scores.max(axis=1, keepdims=True)) / blur)
    for _ in range(SCALINGS):
        shares *= count / clusters / np.maximum(shares.sum(axis=0), np.finfo(float).tiny)
        shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _from_start(rows: Matrix, count: int, start: int) -> tuple[float, Matrix]:
    """How close the rows are to the prototypes found from one start, and these."""
    prototypes: Matrix = kmeans_plusplus(rows, count, random_state=start)[0]
    closeness = 0.0
    for _ in range(ROUNDS):
        scores = rows @ prototypes.T
        shares = balanced(scores)
        closeness = float((shares * scores).sum())
        sums = shares.T @ rows
        prototypes = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return closeness, prototypes
