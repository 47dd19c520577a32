"""Callbacks: what is logged, drawn and saved while something trains."""

from callbacks.log_artifacts import LogArtifacts
from callbacks.loss_change import LossChange
from callbacks.retrieval_metrics import RetrievalMetrics
from callbacks.sample_deviation import SampleDeviation
from callbacks.sample_grid import SampleGrid
from callbacks.save_config import LogConfig

__all__ = ["LogArtifacts", "LogConfig", "LossChange", "RetrievalMetrics", "SampleDeviation", "SampleGrid"]
