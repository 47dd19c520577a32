"""The parts of a pipeline's folder, every tensor of which must come from the folder's own files.

diffusers and transformers put random values in the place of a tensor that is missing and go on. Here a missing,
unknown, misshaped or infinite tensor is refused by file and name, and what else is not as usual is said.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

INDEX = "model_index.json"
# Parts that a loss or an image is computed with; others, such as a safety checker, are diffusers' own affair.
_DECIDING = ("unet", "transformer", "vae", "text_encoder")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANT = re.compile(
    rf"(?:{'|'.join(_STEMS)})(?:\.(?:safetensors|bin)\.index)?\.(?P<variant>\w+)(?:-\d+-of-\d+)?\.(?:safetensors|bin|json)"
)
# What a text encoder's file holds beside it where it was saved as a whole CLIP or a whole T5.
_BESIDE_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "decoder.", "lm_head.")
# BERT's summary of a caption, which no conditioning is made of.
_UNUSED_TEXT = ("pooler.",)
_SHOWN = 3


def local_folder(path: str) -> Path:
    """A pipeline's folder; of a hub id, the one that the hub's cache keeps, into which it is fetched if need be.

    Raises:
        OSError: There is no such pipeline.
        ValueError: The path is neither a folder nor a hub id.
    """
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") > 1:
        raise ValueError(f"{path} is neither a valid local path nor a valid repo id of the hub: there is no folder.")
    return Path(diffusers.DiffusionPipeline.download(path))


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of its parts: name -> (library, class).

    Raises:
        ValueError: It is no such file, or names a library that no part may come from.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(index, dict):
        raise ValueError(f"{path} should name a pipeline's parts; found a {type(index).__name__}.")
    for name, kind in index.items():
        if not (isinstance(kind, list) and len(kind) == 2):
            continue
        library = kind[0]
        # diffusers would import whatever module is named here.
        if library not in (None, "diffusers", "transformers") and not hasattr(diffusers.pipelines, str(library)):
            raise ValueError(
                f"{path}: the part {name} is of {library!r}; only parts of diffusers and transformers are loaded, as "
                "no name from a file may lead to code."
            )
    return index


def decides(name: str) -> bool:
    """Whether a loss or an image is computed with the part of this name."""
    return name.startswith(_DECIDING)


def load_parts(folder: Path, dtype: torch.dtype, given: Iterable[str] = ()) -> tuple[dict[str, nn.Module], list[str]]:
    """Networks, autoencoder and text encoders of a pipeline's folder.

    Args:
        folder: With `model_index.json`.
        dtype: Type of number.
        given: Parts that come from elsewhere.

    Returns:
        The parts by name, and what is to be said of them.

    Raises:
        ValueError: A part, a file or a tensor is missing, or is not what the folder says.
    """
    parts: dict[str, nn.Module] = {}
    notes: list[str] = []
    for name, kind in read_index(folder).items():
        if not decides(name) or name in given or not isinstance(kind, list) or kind[0] is None:
            continue
        part_class = _class_of(kind, f"{folder / INDEX}: {name}")
        if part_class is None:
            continue
        if not (folder / name).is_dir():
            raise ValueError(
                f"{folder} has no folder {name!r}, which its {INDEX} names as the pipeline's {kind[1]}: the download "
                "or the copy is not whole."
            )
        parts[name], said = load_part(folder / name, part_class, dtype)
        notes += said
    return parts, notes


def _class_of(kind: Sequence[Any], where: str) -> Any:
    """The class of a part; None where it is no network of diffusers' or transformers'."""
    library, name = kind
    module: Any = diffusers if library == "diffusers" else transformers
    if library not in ("diffusers", "transformers"):
        return None
    found = getattr(module, str(name), None)
    if found is None:
        raise ValueError(f"{where} is a {name}, which {library} {module.__version__} does not have.")
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def load_part(folder: Path, part_class: Any, dtype: torch.dtype | None = None) -> tuple[nn.Module, list[str]]:
    """One part from its folder; see `load_parts`.

    Args:
        folder: With `config.json` and weights.
        part_class: A model class of diffusers or transformers, or transformers' `AutoModel`.
        dtype: Type of number; None keeps the files'.

    Raises:
        ValueError: See `load_parts`.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: the download or the copy is not whole.")
    variant = _variant(folder)
    options: dict[str, Any] = {} if variant is None else {"variant": variant}
    try:
        part, info = part_class.from_pretrained(
            str(folder), dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{folder}: its .bin file holds more than tensors, and nothing else in it is run. Save the model again as "
            ".safetensors (save_pretrained does), on a machine where the file is trusted."
        ) from error
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded as a {part_class.__name__}: {_first_line(error)}") from error
    notes = check_loaded(part, info, folder)
    if variant is not None:
        notes.append(f"{folder.name}: its variant {variant!r} was loaded, the only one in the folder.")
    return part, notes


def _variant(folder: Path) -> str | None:
    """The variant of the weights, such as fp16, where the folder has no others.

    Raises:
        ValueError: There are no weights, or several variants.
    """
    names = [path.name for path in folder.iterdir()]
    plain = re.compile(rf"(?:{'|'.join(_STEMS)})(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")
    if any(plain.fullmatch(name) for name in names):
        return None
    variants = sorted({match["variant"] for match in map(_VARIANT.fullmatch, names) if match})
    if not variants:
        raise ValueError(
            f"{folder} holds no weights: neither .safetensors nor .bin files of diffusers' or transformers' names."
        )
    if len(variants) > 1:
        raise ValueError(
            f"{folder} holds several variants of the weights ({', '.join(variants)}) and none without a variant; keep "
            "the one that drew the images."
        )
    return variants[0]


def check_loaded(part: nn.Module, info: Mapping[str, Any], folder: Path) -> list[str]:
    """Refuses a part whose tensors are not all from its files, and finite.

    Args:
        part: What was loaded.
        info: What diffusers' or transformers' `from_pretrained` says of it.
        folder: Where from.

    Returns:
        What is to be said of it.

    Raises:
        ValueError: A tensor is missing, unknown, misshaped, or holds values that are no numbers.
    """
    text = isinstance(part, transformers.PreTrainedModel)
    missing = [name for name in info["missing_keys"] if not (text and name.startswith(_UNUSED_TEXT))]
    if missing:
        raise ValueError(
            f"{folder} lacks {_named(missing)}: {type(part).__name__} would be completed with random values. "
            "The file is not whole, or config.json is another model's."
        )
    for name, found, needed in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{folder}: the tensor {name} has shape {_shape(found)}, config.json asks for {_shape(needed)}: one of "
            "both is another model's."
        )
    unknown = [name for name in info["unexpected_keys"] if not (text and name.startswith(_BESIDE_TEXT))]
    if unknown:
        raise ValueError(
            f"{folder} holds {_named(unknown)}, of which {type(part).__name__} knows nothing: config.json is another "
            "model's, or the weights are."
        )
    if info.get("error_msgs"):
        raise ValueError(f"{folder} cannot be loaded: {_first_line(info['error_msgs'][0])}")
    check_finite(part, str(folder))
    return []


def check_finite(part: nn.Module, where: str) -> None:
    """Refuses weights that are no numbers.

    Raises:
        ValueError: A tensor holds NaN or infinity.
    """
    for name, tensor in part.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(
                f"{where}: the tensor {name} holds values that are no finite numbers (NaN or infinity): the file is "
                "damaged, or the training diverged."
            )


def _named(names: Iterable[str]) -> str:
    """`the tensor a`, or `3 tensors (a, b, …)`."""
    listed = sorted(names)
    if len(listed) == 1:
        return f"the tensor {listed[0]}"
    return f"{len(listed)} tensors ({', '.join(listed[:_SHOWN])}{', …' if len(listed) > _SHOWN else ''})"


def _shape(size: Sequence[int]) -> str:
    return " × ".join(str(side) for side in size) or "a single number"


def _first_line(error: object) -> str:
    """An error of a library in one line."""
    return " ".join(str(error).split())[:300]
