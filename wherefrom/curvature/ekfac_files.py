"""EK-FAC factors in files: kronfluence's layout, so that factors made by either package load in the other."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wherefrom.curvature.ekfac import EKFACMatrix, KroneckerFactors
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.runtime.artifacts import read_manifest, replacing, write_manifest
from wherefrom.runtime.checked_files import read_tensors

ACTIVATION, GRADIENT = "activation_eigenvectors.safetensors", "gradient_eigenvectors.safetensors"
EIGENVALUES, PROCESSED = "lambda_matrix.safetensors", "num_lambda_processed.safetensors"
DIAGONAL = "diagonal.safetensors"


def save_ekfac(folder: Path, curvature: EKFACMatrix, model: DiffusionModel) -> None:
    """Saves factors in kronfluence's layout: one file each for Q_A, Q_G, the *sums* of Λ and their counts.

    Beside them `diagonal.safetensors` for parameters without a Kronecker form and a manifest that names the model.

    Raises:
        StorageError: A file could not be written.
    """
    layers, samples = curvature.layers, curvature.samples
    files: dict[str, dict[str, Tensor]] = {
        ACTIVATION: {name: factors.activation for name, factors in layers.items()},
        GRADIENT: {name: factors.gradient for name, factors in layers.items()},
        EIGENVALUES: {name: factors.eigenvalues * samples for name, factors in layers.items()},
        PROCESSED: {name: torch.tensor([samples]) for name in layers},
        DIAGONAL: dict(curvature.diagonal.fisher),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        # Layers with one input share Q_A in memory, which safetensors refuses.
        with replacing(folder / file) as temporary:
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
    write_manifest(folder, {"model": model.fingerprint()})


def load_ekfac(
    folder: Path, model: DiffusionModel, curvature_from: str | None = None, damping: float = 0.1
) -> EKFACMatrix:
    """Factors in kronfluence's layout, refused if they belong to another model.

    Args:
        folder: The files; see `save_ekfac`.
        model: The model that will be unlearned.
        curvature_from: Fingerprint of the model that the factors were made on, where that is on purpose another one, or
            "undeclared" for files without a manifest, which only you can know the origin of.
        damping: Relative damping.

    Raises:
        ValueError: They were made on another model, nothing says on which, or a layer's shape is not the model's.
        FileNotFoundError: A file is missing.
    """
    wanted = model.fingerprint()
    has_manifest = (folder / "manifest.json").exists()
    made_on = str(read_manifest(folder)["identity"]["model"]) if has_manifest else "undeclared"
    if made_on not in (wanted, curvature_from):
        raise ValueError(
            f"{folder} holds the curvature of model {made_on}, but the model to unlearn is {wanted} and "
            f"curvature_from declares {'nothing' if curvature_from is None else repr(curvature_from)}. Fit it on this "
            f"model, or, if you know that it belongs to this model or its base, set curvature_from: {made_on}."
        )
    parts = [read_tensors(folder / file) for file in (ACTIVATION, GRADIENT, EIGENVALUES, PROCESSED)]
    activation, gradient, sums, counts = parts
    shapes = {name: tuple(value.shape) for name, value in model.denoiser.named_parameters()}
    layers = {}
    for name, total in sums.items():
        rows, columns = total.shape
        shape = shapes.get(f"{name}.weight")
        inputs = 0 if shape is None else torch.Size(shape[1:]).numel()
        bias = columns == inputs + 1
        if shape is None or rows != shape[0] or columns not in (inputs, inputs + 1):
            raise ValueError(
                f"{folder}: layer {name!r} has eigenvalues of shape {tuple(total.shape)}, its weight in the model to "
                f"unlearn {shape}: they were made for a model of another kind."
            )
        layers[name] = KroneckerFactors(
            activation[name].to(model.dtype),
            gradient[name].to(model.dtype),
            (total / counts[name]).to(model.dtype),
            bias,
        )
    diagonal = read_tensors(folder / DIAGONAL) if (folder / DIAGONAL).exists() else {}
    samples = int(next(iter(counts.values()))) if counts else 1
    return EKFACMatrix(layers, diagonal, damping, samples)
