"""Classical and early deep methods of cross-media retrieval, to compare with: CCA, deep CCA, JRL."""

from __future__ import annotations

from dckt_trainer.baselines.cca import CCA, fit_cca
from dckt_trainer.baselines.dcca import dcca_loss
from dckt_trainer.baselines.jrl import JRL, JRLSettings, fit_jrl

__all__ = ["CCA", "JRL", "JRLSettings", "dcca_loss", "fit_cca", "fit_jrl"]
