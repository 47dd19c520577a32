"""Learned ranker: feature embedding in which similar means influential (Fast Data Attribution, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from wherefrom.runtime.artifacts import read_manifest, replacing, write_manifest
from wherefrom.runtime.checked_files import read_tensors
from wherefrom.runtime.tensor_hash import hash_tensors

WEIGHTS = "ranker.safetensors"


class _MLP(nn.Module):
    """MLP with ReLU and dropout; parameters are named as in FastGDA's checkpoints."""

    def __init__(self, inputs: int, width: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        sizes = [inputs, *[width] * hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.output_layer = nn.Linear(sizes[-1], outputs)
        self.dropout = dropout
        for layer in (*self.layers, self.output_layer):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        for layer in self.layers:
            features = F.dropout(F.relu(layer(features)), self.dropout, self.training)
        embedded: Tensor = self.output_layer(features)
        return embedded


class Ranker(nn.Module):
    """Embeds queries and training images with one MLP; logit = cosine · scale + bias, low where influential.

    Args:
        inputs: Width of the concatenated features of all encoders.
        width: Width of the hidden layers.
        hidden: Number of hidden layers.
        outputs: Width of the embedding.
        dropout: Dropout rate of hidden activations.
        parts: Width of each encoder's features, in order; each part is scaled to a root mean square of 1, since
            otherwise the encoder with the largest values dominates. Empty leaves features unscaled, as in the paper.
        skip: Add a linear skip connection and initialise the last layer to zero: training starts from (a random
            projection of) the raw features, each encoder's with equal weight, instead of a random embedding. Not in the
            paper.

    Raises:
        ValueError: A size is not positive, the dropout not a rate, or the parts do not sum to the inputs.
    """

    def __init__(
        self,
        inputs: int,
        *,
        width: int = 768,
        hidden: int = 3,
        outputs: int = 768,
        dropout: float = 0.1,
        parts: Sequence[int] = (),
        skip: bool = False,
    ) -> None:
        super().__init__()
        if min(inputs, width, outputs, *parts) < 1 or hidden < 0 or not 0 <= dropout < 1:
            raise ValueError(
                "A ranker needs positive sizes and a dropout from 0 to below 1; given inputs "
                f"{inputs}, width {width}, hidden {hidden}, outputs {outputs}, parts {[*parts]}, dropout {dropout}."
            )
        if parts and sum(parts) != inputs:
            raise ValueError(f"The ranker's parts {[*parts]} must sum to its inputs, {inputs}.")
        self.sizes: dict[str, Any] = {
            "inputs": inputs,
            "width": width,
            "hidden": hidden,
            "outputs": outputs,
            "dropout": dropout,
        }
        self.sizes |= {"parts": [*parts]} if parts else {}
        self.sizes |= {"skip": True} if skip else {}
        self.parts = tuple(parts)
        self.mlp = _MLP(inputs, width, hidden, outputs, dropout)
        self.skip = nn.Linear(inputs, outputs, bias=False) if skip else None
        if self.skip is not None:
            nn.init.orthogonal_(self.skip.weight)
            with torch.no_grad():  # each encoder counts as much at the start, however wide it is
                for columns in self.skip.weight.split(self.parts or (inputs,), dim=1):
                    columns /= math.sqrt(columns.shape[1])
            nn.init.zeros_(self.mlp.output_layer.weight)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    @property
    def inputs(self) -> int:
        """Width of the features."""
        return int(self.sizes["inputs"])

    def embed(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """Embeds features as unit vectors; their inner product is the cosine.

        Raises:
            ValueError: The features have another width.
        """
        if features.shape[-1] != self.inputs:
            raise ValueError(f"The ranker takes {self.inputs} features, given {features.shape[-1]}.")
        if self.parts:
            rows = features.split(self.parts, dim=-1)
            scaled = [F.normalize(part, dim=-1) * math.sqrt(part.shape[-1]) for part in rows]
            features = torch.cat(scaled, dim=-1)
        embedded = self.mlp(features)
        return F.normalize(embedded if self.skip is None else embedded + self.skip(features), dim=-1)

    @torch.no_grad()
    def embed_all(
        self, features: Float[Tensor, "n d"] | Float[NDArray[np.floating[Any]], "n d"], rows: int = 4096
    ) -> Float[Tensor, "n e"]:
        """Embeds features without dropout, in batches, on the ranker's device.

        Args:
            features: Concatenated features of all encoders; may be memory-mapped.
            rows: Rows per batch. It may change the last digits; with 1, a row's result is independent of others.

        Raises:
            ValueError: The features have another width.
        """
        training = self.training
        self.eval()
        try:
            blocks = (features[start : start + rows] for start in range(0, max(len(features), 1), rows))
            tensors = (block if isinstance(block, Tensor) else torch.from_numpy(np.array(block)) for block in blocks)
            return torch.cat([self.embed(each.to(self.scale.device, self.scale.dtype)) for each in tensors])
        finally:
            self.train(training)

    def logits(self, cosines: Tensor) -> Tensor:
        """Computes logits, whose sigmoid predicts the normalised rank (0 the most influential)."""
        return cosines * self.scale + self.bias

    def forward(self, queries: Float[Tensor, "q d"], images: Float[Tensor, "n d"]) -> Float[Tensor, "q n"]:
        """Computes the logits of all pairs; each row is embedded once."""
        return self.logits(self.embed(queries) @ self.embed(images).T)

    def identity(self) -> dict[str, Any]:
        """Identity of the ranker: sizes and weights."""
        return {"sizes": dict(self.sizes), "weights": hash_tensors(self.state_dict())}


def save_ranker(folder: Path, ranker: Ranker, features: Sequence[str], **extra: Any) -> None:
    """Saves a ranker: `ranker.safetensors` and `manifest.json`.

    Args:
        folder: Output folder.
        ranker: The ranker.
        features: Names of the encoders whose features it takes, in order.
        extra: Further entries of the manifest, such as how it was trained.

    Raises:
        StorageError: A file could not be written.
    """
    with replacing(folder / WEIGHTS) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in ranker.state_dict().items()}, temporary)
    write_manifest(folder, {**ranker.identity(), "features": list(features)}, **extra)


def load_ranker(folder: Path) -> tuple[Ranker, list[str]]:
    """Loads a ranker and the names of the encoders whose features it takes.

    Raises:
        FileNotFoundError: The folder holds no ranker.
        ValueError: It is damaged, or another architecture's.
    """
    identity: Mapping[str, Any] = read_manifest(folder)["identity"]
    try:
        ranker = Ranker(**identity["sizes"])
        ranker.load_state_dict(read_tensors(folder / WEIGHTS, remedy="Copy the ranker again"))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no ranker that can be read: {error}") from error
    if ranker.identity()["weights"] != identity["weights"]:
        raise ValueError(f"{folder / WEIGHTS} does not match its manifest: copy both again.")
    return ranker.eval(), list(identity["features"])
