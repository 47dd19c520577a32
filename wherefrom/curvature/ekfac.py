"""EK-FAC: the empirical Fisher information, eigenvalue-corrected in a Kronecker-factored basis (George et al. 2018).

It is the curvature of AbU+ (Fast Data Attribution, section 3). Of a linear layer with weight W (O, I), input rows a and
output gradients g at each position, A = E[aaᵀ] and G = E[ggᵀ] have the eigenvectors Q_A and Q_G; the eigenvalues are
measured in their basis, Λ = E over samples of (Q_Gᵀ ∇W Q_A)², with ∇W the exact gradient of one sample. A convolution
is a linear layer over its unfolded patches; a bias is the last column of W, its input a 1. Parameters without a
Kronecker form (norms, biases alone) keep their diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from wherefrom.curvature.base import CurvatureMatrix, finite_rows
from wherefrom.curvature.diagonal import DiagonalMatrix
from wherefrom.curvature.ekfac_passes import CovariancePass, EigenvaluePass
from wherefrom.curvature.fisher_samples import FisherSettings
from wherefrom.curvature.kronecker import LayerPlan, plan_layers
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import Identity, Store, replacing
from wherefrom.runtime.checked_files import read_tensors
from wherefrom.runtime.console import Progress
from wherefrom.runtime.dataset_pass import run_pass
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.stable_names import settings_identity

VECTORS, EIGENVALUE_PASS = "eigenvectors.safetensors", "ekfac_eigenvalues"
_SHAPES = (
    "The curvature of {!r} has shape {}, its gradient {}: it was made for other weights. "
    "Fit it with the same `weights` and model."
)
_BOTH = "The curvature of {!r} is that of weight and bias together; give both gradients."


@dataclass(frozen=True)
class KroneckerFactors:
    """One layer's curvature.

    Attributes:
        activation: Q_A, eigenvectors in columns, shape (I, I).
        gradient: Q_G, shape (O, O).
        eigenvalues: Λ, shape (O, I).
        bias: Whether the bias is the last column.
    """

    activation: Float[Tensor, "i i"]
    gradient: Float[Tensor, "o o"]
    eigenvalues: Float[Tensor, "o i"]
    bias: bool

    def precondition(self, matrix: Float[Tensor, "o i"], damping: float) -> Float[Tensor, "o i"]:
        """Q_G ((Q_Gᵀ V Q_A) / (Λ + δ)) Q_Aᵀ, δ = damping · mean(Λ)."""
        left, right, values = (
            part.to(matrix.device, matrix.dtype) for part in (self.gradient, self.activation, self.eigenvalues)
        )
        return left @ ((left.T @ matrix @ right) / (values + damping * values.mean())) @ right.T

    def whiten(self, matrices: Float[Tensor, "b o i"], damping: float) -> Float[Tensor, "b o i"]:
        """(Q_Gᵀ V Q_A) / √(Λ + δ)."""
        left, right, values = (
            part.to(matrices.device, matrices.dtype) for part in (self.gradient, self.activation, self.eigenvalues)
        )
        return (left.T @ matrices @ right) / (values + damping * values.mean()).sqrt()


class EKFACMatrix(CurvatureMatrix):
    """F⁻¹ of EK-FAC, layer by layer, with damping relative to each layer's mean eigenvalue.

    Args:
        layers: Factors by module name.
        diagonal: Mean squared gradients of the parameters without a Kronecker form.
        damping: Relative damping.
        samples: How many samples the eigenvalues are means over.

    Raises:
        ValueError: The damping is negative, or eigenvalues are negative or not finite.
    """

    def __init__(
        self,
        layers: Mapping[str, KroneckerFactors],
        diagonal: Mapping[str, Tensor] | None = None,
        damping: float = 0.1,
        samples: int = 1,
    ) -> None:
        for name, factors in layers.items():
            values = factors.eigenvalues
            if not torch.isfinite(values).all() or (values < 0).any():
                raise ValueError(
                    f"The eigenvalues of layer {name!r} are negative or not finite; make the curvature again."
                )
        self.layers, self.diagonal = dict(layers), DiagonalMatrix(diagonal or {}, damping)
        self.damping, self.samples = damping, samples

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F⁻¹ g.

        Raises:
            ValueError: A parameter is missing on either side or has another shape, or a step is not finite.
        """
        owners, rest = self._split(gradients)
        steps = self.diagonal.precondition(rest)
        for owner in owners:
            steps |= self._layer_step(owner, self.layers[owner], gradients)
        for name, step in steps.items():
            if not torch.isfinite(step).all():
                raise ValueError(
                    f"The Newton step of {name!r} is not finite: some eigenvalues are 0. Set damping above 0."
                )
        return {name: steps[name] for name in gradients}

    def whiten(self, gradients: Mapping[str, Float[Tensor, "b n"]]) -> dict[str, Float[Tensor, "b m"]]:
        """Coordinates in the eigenbasis over √(Λ + δ); those of a layer's bias are with its weight's.

        Raises:
            ValueError: A parameter is missing on either side or has another shape, or a coordinate is not finite.
        """
        owners, rest = self._split(gradients)
        result = self.diagonal.whiten(rest)
        for owner in owners:
            factors, name = self.layers[owner], f"{owner}.weight"
            rows, (outputs, inputs) = gradients[name], factors.eigenvalues.shape
            if rows.shape[1] != outputs * (inputs - factors.bias):
                raise ValueError(_SHAPES.format(owner, (outputs, inputs), f"{rows.shape[1]} numbers"))
            matrices = rows.unflatten(1, (outputs, -1))
            if factors.bias:
                matrices = torch.cat([matrices, gradients[f"{owner}.bias"][:, :, None]], dim=2)
            result[name] = finite_rows(name, factors.whiten(matrices, self.damping).flatten(1))
        return result

    def _split(self, gradients: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        """Layers with factors, whose gradients are all there, and the other gradients.

        Raises:
            ValueError: Weight or bias is missing where the factors are of both.
        """
        owners, rest = [], {}
        for name, gradient in gradients.items():
            owner, _, kind = name.rpartition(".")
            factors = self.layers.get(owner)
            if factors is None or (kind == "bias" and not factors.bias):
                rest[name] = gradient
                continue
            if factors.bias and not {f"{owner}.weight", f"{owner}.bias"} <= set(gradients):
                raise ValueError(_BOTH.format(owner))
            if kind == "weight":
                owners.append(owner)
        return owners, rest

    def lacks(self, names: Sequence[str]) -> list[str]:
        """Parameters with neither factors nor a diagonal, and what makes up one matrix with them but is not there."""
        wanted, missing = set(names), []
        for name in names:
            owner, _, kind = name.rpartition(".")
            factors = self.layers.get(owner)
            if factors is None or (kind == "bias" and not factors.bias):
                missing += self.diagonal.lacks([name])
            elif factors.bias:
                partner = f"{owner}.{'bias' if kind == 'weight' else 'weight'}"
                missing += [partner] if partner not in wanted else []
        return missing

    def _layer_step(self, owner: str, factors: KroneckerFactors, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = gradients[f"{owner}.weight"]
        matrix = weight.flatten(1)
        if factors.bias:
            matrix = torch.cat([matrix, gradients[f"{owner}.bias"][:, None]], dim=1)
        if matrix.shape != factors.eigenvalues.shape:
            raise ValueError(_SHAPES.format(owner, tuple(factors.eigenvalues.shape), tuple(matrix.shape)))
        step = factors.precondition(matrix, self.damping)
        if not factors.bias:
            return {f"{owner}.weight": step.reshape(weight.shape)}
        return {f"{owner}.weight": step[:, :-1].reshape(weight.shape), f"{owner}.bias": step[:, -1]}


def eigenvectors_of(name: str, covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Eigenvectors in columns, in float64.

    Raises:
        ValueError: The covariance is not finite, or has no decomposition.
    """
    if not torch.isfinite(covariance).all():
        raise ValueError(f"The covariance {name!r} is not finite: check the model's weights and latents.")
    try:
        vectors: Tensor = torch.linalg.eigh(covariance.double()).eigenvectors
    except RuntimeError as error:
        raise ValueError(f"The covariance {name!r} has no eigendecomposition ({error}).") from error
    return vectors.contiguous()


def block_identity(model: DiffusionModel, data: EncodedImages, block: LayerPlan, settings: FisherSettings) -> Identity:
    """Identity of a block's covariances, eigenvectors and eigenvalues in the store."""
    return {
        "model": model.fingerprint(),
        "data": data.weighted_fingerprint,
        "weights": sorted(block.names),
        "dtype": str(model.dtype),
        **settings_identity(settings),
    }


def _eigenvectors(
    model: DiffusionModel,
    *,
    data: EncodedImages,
    block: LayerPlan,
    store: Store,
    runner: Runner,
    settings: FisherSettings,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    """A block's eigenvectors, by a pass over the training set; its sums are freed."""
    identity = block_identity(model, data, block, settings)
    sums = run_pass(
        lambda: CovariancePass(model, data, block, settings, batch_size),
        count=len(data),
        store=store,
        kind="ekfac_covariance",
        identity=identity,
        runner=runner,
        progress=progress,
    ).covariances()

    def build(folder: Path) -> None:
        vectors = {name: eigenvectors_of(name, value).cpu().contiguous() for name, value in sums.items()}
        with replacing(folder / VECTORS) as temporary:
            save_file(vectors, temporary)

    # One process decomposes for all: another machine's eigenvectors may differ in sign or rotation.
    if runner.is_main:
        store.make("ekfac_eigenvectors", identity, build)
    runner.barrier()
    return read_tensors(store.path("ekfac_eigenvectors", identity) / VECTORS)


def _fit_block(
    model: DiffusionModel,
    *,
    data: EncodedImages,
    block: LayerPlan,
    store: Store,
    runner: Runner,
    settings: FisherSettings,
    batch_size: int,
    progress: Progress | None,
) -> EKFACMatrix:
    """The curvature of some of the layers; intermediate sums are freed."""
    vectors: dict[str, Tensor] = {}
    if block.layers:
        vectors = _eigenvectors(
            model,
            data=data,
            block=block,
            store=store,
            runner=runner,
            settings=settings,
            batch_size=batch_size,
            progress=progress,
        )
    work = run_pass(
        lambda: EigenvaluePass(
            model, data=data, plan=block, eigenvectors=vectors, settings=settings, batch_size=batch_size
        ),
        count=len(data),
        store=store,
        kind=EIGENVALUE_PASS,
        identity=block_identity(model, data, block, settings),
        runner=runner,
        progress=progress,
    )
    # Layers with one input share one Q_A in memory too.
    kept = {name: value.to(model.device, model.dtype) for name, value in vectors.items()}
    layers = {
        layer.module: KroneckerFactors(
            kept[f"A/{layer.source}"],
            kept[f"G/{layer.module}"],
            (work.sums[f"L/{layer.module}"] / work.samples).to(model.dtype),
            layer.bias,
        )
        for layer in block.layers
    }
    diagonal = {name: (total / work.samples).to(model.dtype) for name, total in work.diagonal.items()}
    return EKFACMatrix(layers, diagonal, samples=work.samples)


def fit_ekfac(
    model: DiffusionModel,
    *,
    data: EncodedImages,
    names: Sequence[str],
    store: Store,
    runner: Runner,
    settings: FisherSettings = FisherSettings(),
    damping: float = 0.1,
    layers_per_pass: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> EKFACMatrix:
    """EK-FAC of these weights over the training set: two passes, cached in the store and resumed after an interruption.

    Args:
        model: The pretrained model.
        data: Its training images.
        names: Parameters.
        store: Where it is kept.
        runner: Rank and world size of this process.
        settings: How to sample; both passes see the same samples.
        damping: Relative damping.
        layers_per_pass: Fit so many layers at a time, which bounds memory and costs two passes each; None is all.
        batch_size: Samples at a time; does not change the result.
        progress: Called with (done, total) chunks of each pass.

    Raises:
        ValueError: A layer has no per-sample gradient, a gradient or covariance is not finite, or `layers_per_pass` is
            not positive.
        StorageError: The store could not be written.
    """
    if layers_per_pass is not None and layers_per_pass < 1:
        raise ValueError(f"layers_per_pass must be at least 1, or null for all layers; given {layers_per_pass}.")
    layers: dict[str, KroneckerFactors] = {}
    diagonal: dict[str, Tensor] = {}
    samples = 1
    for block in plan_layers(model, data, names).blocks(layers_per_pass):
        part = _fit_block(
            model,
            data=data,
            block=block,
            store=store,
            runner=runner,
            settings=settings,
            batch_size=batch_size,
            progress=progress,
        )
        layers, diagonal, samples = layers | part.layers, diagonal | part.diagonal.fisher, part.samples
    return EKFACMatrix(layers, diagonal, damping, samples)
