"""Estimated cost of fitting EK-FAC: layers, passes, memory, and time measured on a small batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from wherefrom.curvature.ekfac import EIGENVALUE_PASS, block_identity
from wherefrom.curvature.ekfac_passes import CovariancePass, EigenvaluePass
from wherefrom.curvature.fisher_samples import FisherSettings, SampledPass
from wherefrom.curvature.kronecker import LayerPlan, plan_layers
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import duration

_SMALL_BATCH, _SIDE = 16, 256


def ekfac_plan(
    model: DiffusionModel,
    *,
    data: EncodedImages,
    names: Sequence[str],
    settings: FisherSettings,
    layers_per_pass: int | None = None,
    store: Store | None = None,
    world_size: int = 1,
) -> str:
    """A line for the log: layers, passes, samples, memory and time of a fit, and which parameters keep a diagonal.

    Args:
        model: The pretrained model.
        data: Its training images.
        names: Parameters.
        settings: How to sample.
        layers_per_pass: Fit so many layers at a time.
        store: Where what is there already takes no time.
        world_size: Processes that share the passes.
    """
    plan = plan_layers(model, data, names)
    blocks = plan.blocks(layers_per_pass)
    samples = len(data) * settings.per_image
    memory = max(block.memory() for block in blocks) / 2**20
    rest = f"; the diagonal for {len(plan.diagonal)} others ({', '.join(plan.diagonal[:3])} …)" if plan.diagonal else ""
    left = [block for block in blocks if not _found(model, data, block, settings, store)]
    took = "kept from before"
    if left:
        seconds = sum(fit_seconds(model, data, block, settings, world_size) for block in left)
        took = f"about {duration(seconds)}"
    return (
        f"EK-FAC of {len(plan.layers)} layers in {2 * len(blocks)} passes over {samples:,} samples, "
        f"{memory:,.0f} MiB of factors at a time and {plan.kept(model.dtype.itemsize) / 2**20:,.0f} MiB in the end, "
        f"{took}{rest}"
    )


def _found(
    model: DiffusionModel, data: EncodedImages, block: LayerPlan, settings: FisherSettings, store: Store | None
) -> bool:
    return store is not None and store.find(EIGENVALUE_PASS, block_identity(model, data, block, settings)) is not None


def fit_seconds(
    model: DiffusionModel, data: EncodedImages, block: LayerPlan, settings: FisherSettings, world_size: int = 1
) -> float:
    """Estimated seconds of fitting a block: a small batch of each pass and one decomposition are measured.

    Larger batches and matrices are somewhat faster, so it is rather too long than too short.
    """
    few = range(min(len(data), -(-_SMALL_BATCH // settings.per_image)))
    sides = {f"A/{layer.source}": layer.inputs for layer in block.layers}
    sides |= {f"G/{layer.module}": layer.outputs for layer in block.layers}
    # Which vectors does not matter to the time.
    basis = {name: torch.eye(side, dtype=model.dtype) for name, side in sides.items()}
    passes: list[Callable[[], SampledPass]] = [
        lambda: EigenvaluePass(
            model, data=data, plan=block, eigenvectors=basis, settings=settings, batch_size=_SMALL_BATCH
        ),
    ]
    if block.layers:
        passes.append(lambda: CovariancePass(model, data, block, settings, _SMALL_BATCH))
    seconds = 0.0
    for make in passes:
        work = make()
        work.step(few)  # not counted: it also makes what all batches share
        started = time.perf_counter()
        work.step(few)
        seconds += (time.perf_counter() - started) * len(data) / (len(few) * world_size)
    matrix = torch.eye(_SIDE, dtype=torch.float64, device=model.device) + 1.0
    started = time.perf_counter()
    float(torch.linalg.eigh(matrix).eigenvalues.sum())  # waits for the device
    return seconds + (time.perf_counter() - started) * sum(side**3 for side in sides.values()) / _SIDE**3
