"""The common space in closed form, for targets of few pairs.

There is nothing to learn by gradient, and what validation chooses is a handful of numbers.

Each domain's features are centred and scaled. Let C_ii, C_tt be its covariances of images and of texts and C_it the
cross-covariance of its classes' means. What transfers between label spaces is how the media correlate: each of the
three is mixed, (1 - m) of the target's and m of the source's, and a regularised canonical correlation analysis,

    (C_ii + r v_i I)^-1/2  C_it  (C_tt + r v_t I)^-1/2  =  U diag(rho) V',     v the mean variances,

gives the common space. Its coordinates are weighted by rho^p. There each class of the target has a prototype, the mean
of its pairs' unit vectors z in both media. With P the prototypes, softmax(z P' / T) are class probabilities. Beside
them stand those of a logistic regression for each medium, which the more pairs there are the better they get. Items are
compared by

    (1 - v) (w cos(probabilities) + (1 - w) cos(z)) + v cos(probabilities of the regressions),

which is the cosine of all three, one behind the other. m = 0 leaves the source out.

Where the target's labels are unknown, its pairs take the place of classes in C_it, beside a second space where clusters
do so in part, and clusters of pairs that of the prototypes (:mod:`dckt_trainer.linear.unlabelled`); there are no
regressions.

Shape letters: N pairs, F features of a medium, R of them after reduction, D dimensions of the space, C classes.
"""

from __future__ import annotations

from dckt_trainer.linear.choose import fit_both, transfer_helps
from dckt_trainer.linear.clusters import default_clusters
from dckt_trainer.linear.fit import Choice, Fitted, fit_linear
from dckt_trainer.linear.model import LinearModel
from dckt_trainer.linear.unlabelled import fit_unlabelled

__all__ = [
    "Choice",
    "Fitted",
    "LinearModel",
    "default_clusters",
    "fit_both",
    "fit_linear",
    "fit_unlabelled",
    "transfer_helps",
]
