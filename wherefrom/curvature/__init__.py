"""Curvature of the training loss: what a step of unlearning is preconditioned with."""

from wherefrom.curvature.base import Curvature, Identity
from wherefrom.curvature.diagonal import Diagonal, FisherSettings, fit_diagonal, load_diagonal

__all__ = ["Curvature", "Diagonal", "FisherSettings", "Identity", "fit_diagonal", "load_diagonal"]
