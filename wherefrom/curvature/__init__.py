"""Curvature of the training loss, by which the gradient of a query's loss is preconditioned.

Two kinds of classes: a `Curvature` is a method's setting, the estimator that is injected by `class_path`
(`DiagonalFisher`, `EKFAC` or `Identity`); its `fit` and `load` return a `CurvatureMatrix`, the fitted matrix F
(`DiagonalMatrix`, `EKFACMatrix` or `IdentityMatrix`), of which only the inverse's action F⁻¹ g is ever needed.
"""

from wherefrom.curvature.base import CurvatureMatrix, IdentityMatrix
from wherefrom.curvature.diagonal import DiagonalMatrix, fit_diagonal, load_diagonal
from wherefrom.curvature.ekfac import EKFACMatrix, fit_ekfac
from wherefrom.curvature.ekfac_files import load_ekfac, save_ekfac
from wherefrom.curvature.estimators import EKFAC, Curvature, DiagonalFisher, FitContext, Identity
from wherefrom.curvature.fisher_samples import FisherSettings
from wherefrom.curvature.planning import ekfac_plan

__all__ = [
    "EKFAC",
    "Curvature",
    "CurvatureMatrix",
    "DiagonalFisher",
    "DiagonalMatrix",
    "EKFACMatrix",
    "FisherSettings",
    "FitContext",
    "Identity",
    "IdentityMatrix",
    "ekfac_plan",
    "fit_diagonal",
    "fit_ekfac",
    "load_diagonal",
    "load_ekfac",
    "save_ekfac",
]
