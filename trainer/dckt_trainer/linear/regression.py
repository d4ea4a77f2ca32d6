"""Logistic regressions of one medium's rows, along a path of strengths."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dckt_trainer.linear.basis import Matrix

STEPS = 300  # of the solver; more change no probability that matters
NEVER = -30.0  # the logit of a class without training pairs


@dataclass(frozen=True)
class Regression:
    """Class probabilities of rows (N, R).

    Attributes:
        weight: (R, C)
        bias: (C,)
    """

    weight: Matrix
    bias: Matrix

    def probabilities(self, rows: Matrix) -> Matrix:
        """Of each row and class, (N, C)."""
        return softmax(rows @ self.weight + self.bias)


def regressions(rows: Matrix, labels: NDArray[np.int64], classes: int, strengths: Sequence[float]) -> list[Regression]:
    """A multinomial regression with a quadratic penalty for each strength, rising, each begun where the last ended."""
    return list(_path(rows, labels, classes, strengths))


def _path(rows: Matrix, labels: NDArray[np.int64], classes: int, strengths: Sequence[float]) -> Iterator[Regression]:
    known, codes = np.unique(labels, return_inverse=True)
    model = LogisticRegression(max_iter=STEPS, warm_start=True)
    for strength in strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "The number of unique classes")  # one pair a class is no mistake
            model.fit(rows, codes)
        weight, bias = np.zeros((rows.shape[1], classes)), np.full(classes, NEVER)
        # Of two classes there is one row, that of the second against the first.
        own, offset = model.coef_, model.intercept_
        if len(own) == 1:
            own, offset = np.concatenate([-own, own]) / 2, np.concatenate([-offset, offset]) / 2
        weight[:, known], bias[known] = own.T, offset
        yield Regression(weight, bias)


def softmax(logits: Matrix) -> Matrix:
    """Probabilities of each row, (N, C)."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Matrix = raised / raised.sum(axis=1, keepdims=True)
    return probabilities
