"""Curvature of the training loss: what a step of unlearning is preconditioned with."""

from wherefrom.curvature.base import Curvature, Identity
from wherefrom.curvature.diagonal import Diagonal, fit_diagonal, load_diagonal
from wherefrom.curvature.ekfac import EKFAC, fit_ekfac, load_ekfac, save_ekfac
from wherefrom.curvature.fisher_samples import FisherSettings
from wherefrom.curvature.planning import ekfac_plan

__all__ = [
    "EKFAC",
    "Curvature",
    "Diagonal",
    "FisherSettings",
    "Identity",
    "ekfac_plan",
    "fit_diagonal",
    "fit_ekfac",
    "load_diagonal",
    "load_ekfac",
    "save_ekfac",
]
