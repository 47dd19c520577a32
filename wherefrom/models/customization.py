"""Customized models (Custom Diffusion, Kumari et al. 2023): cross-attention K/V of their own, and a new word V*.

Both belong together: the new word's embedding alone, or the weights alone, draw other images. A customized model is a
folder of two or more files beside the base model that it changes:

- `pytorch_custom_diffusion_weights` as `.safetensors`, `.bin` or `.pt`: the weights, under the U-Net's parameter names
  (the papers' layout) or under those of diffusers' attention processors (its training script's);
- `<new1>` as `.safetensors`, `.bin` or `.pt`, one for each new word, in textual inversion's layout: {word: embedding};
- `customized.json`, which we write: {"base": where the base model is}. With it the folder loads wherever a model does.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import CaptionEncoder
from wherefrom.models.parameter_subsets import copy_into, select_weights
from wherefrom.models.prompt_encoders import PromptEncoder
from wherefrom.runtime.artifacts import replacing, write_json

WEIGHTS = "pytorch_custom_diffusion_weights"
BASE = "customized.json"
_SUFFIXES = (".safetensors", ".bin", ".pt")
# What follows an attention layer's name in diffusers' layout, and what it replaces.
_PROCESSOR = ".processor."
_OWN = {
    "to_k_custom_diffusion.weight": "to_k.weight",
    "to_v_custom_diffusion.weight": "to_v.weight",
    "to_q_custom_diffusion.weight": "to_q.weight",
    "to_out_custom_diffusion.0.weight": "to_out.0.weight",
    "to_out_custom_diffusion.0.bias": "to_out.0.bias",
}


@dataclass(frozen=True)
class Customization:
    """What a customized model has of its own.

    Attributes:
        weights: By the U-Net's parameter names.
        embeddings: Of each new word.
    """

    weights: Mapping[str, Tensor]
    embeddings: Mapping[str, Float[Tensor, " d"]]


def is_customized(folder: Path) -> bool:
    """Whether a folder holds weights or new words of a customized model."""
    return folder.is_dir() and any(any(folder.glob(f"{start}*")) for start in (WEIGHTS, "<"))


def read_customization(folder: str | Path) -> Customization:
    """Reads the files of a customized model; nothing is unpickled.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The weights or the new words are missing, there are several files of one, or a file is damaged or
            of another layout.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}: a customized model is a folder of weights and new words."
        )
    weights_files = [folder / f"{WEIGHTS}{suffix}" for suffix in _SUFFIXES if (folder / f"{WEIGHTS}{suffix}").is_file()]
    word_files = sorted(path for suffix in _SUFFIXES for path in folder.glob(f"<*>{suffix}"))
    if not weights_files and not word_files:
        raise ValueError(
            f"{folder} holds no customized model: neither {WEIGHTS}.(safetensors|bin|pt) nor a new word such as "
            "'<new1>.bin'."
        )
    if not word_files:
        raise ValueError(
            f"{folder} holds only the cross-attention weights ({weights_files[0].name}) and no new word: without its "
            "embedding the model's images are not reproduced. Put the file '<new1>.bin' (or .safetensors) of the "
            "same training beside it."
        )
    if not weights_files:
        raise ValueError(
            f"{folder} holds only the new word ({word_files[0].name}) and no cross-attention weights: without them "
            f"the model's images are not reproduced. Put {WEIGHTS}.bin (or .safetensors, .pt) of the same training "
            "beside it."
        )
    if len(weights_files) > 1:
        raise ValueError(f"{folder} holds several files of weights, of which only one can be meant: {weights_files}.")
    embeddings: dict[str, Tensor] = {}
    for path in word_files:
        for word, value in _read(path).items():
            if word in embeddings:
                raise ValueError(f"{path}: the word {word!r} comes in another file of {folder} too.")
            if not isinstance(value, Tensor) or value.numel() != value.shape[-1]:
                raise ValueError(f"{path}: {word!r} should be one embedding, a vector; found {_kind(value)}.")
            embeddings[word] = value.reshape(-1)
    return Customization(_named(_read(weights_files[0]), weights_files[0]), embeddings)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True, mmap=False)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as tensors, and nothing else in it is run: {error}") from error
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} should hold named tensors; found {_kind(content)}.")
    return content


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _named(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Weights under the U-Net's own names."""
    result: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and not value:
            continue  # diffusers writes layers that have nothing of their own so
        layer, processor, own = name.partition(_PROCESSOR)
        if processor and own not in _OWN:
            raise ValueError(f"{path}: {name!r} is no weight of Custom Diffusion; known are {', '.join(_OWN)}.")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!r} should be a tensor; found {_kind(value)}.")
        result[f"{layer}.{_OWN[own]}" if processor else name] = value
    return result


def add_word(text: CaptionEncoder, word: str, embedding: Float[Tensor, " d"]) -> int:
    """Teaches a text encoder one new word, which its tokenizer then keeps whole; returns the word's number.

    Raises:
        ValueError: The word is known already, or the embedding is of another width.
    """
    table = _table(text)
    if embedding.shape != table.weight.shape[1:]:
        raise ValueError(
            f"The embedding of {word!r} has {embedding.numel()} numbers, but this text encoder's have "
            f"{table.weight.shape[1]}: the model was customized from another base."
        )
    if word in text.tokenizer.get_vocab():
        raise ValueError(f"The tokenizer knows {word!r} already: choose another word.")
    text.tokenizer.add_tokens(word)
    model: Any = text.model
    if len(text.tokenizer) > table.num_embeddings:
        model.resize_token_embeddings(len(text.tokenizer), mean_resizing=False)
    table = _table(text)
    number = int(text.tokenizer.convert_tokens_to_ids(word))
    with torch.no_grad():
        table.weight[number] = embedding.to(table.weight.device, table.weight.dtype)
    table.weight.requires_grad_(False)
    return number


def embedding_of(text: CaptionEncoder, word: str) -> Float[Tensor, " d"]:
    """A copy of the embedding of a word of one token, such as one that a new word begins from.

    Raises:
        ValueError: The word is several tokens, or none.
    """
    numbers = text.tokenizer(word, add_special_tokens=False).input_ids
    if len(numbers) != 1:
        raise ValueError(
            f"The word {word!r} is {len(numbers)} tokens of this text encoder: choose one that is a single."
        )
    return _table(text).weight[numbers[0]].detach().clone()


def _table(text: CaptionEncoder) -> nn.Embedding:
    model: Any = text.model
    table: nn.Embedding = model.get_input_embeddings()
    return table


def encoder_of(model: DiffusionModel) -> CaptionEncoder:
    """The text encoder of a model that can be customized.

    Raises:
        ValueError: The model has none, or several.
    """
    if model.encoder is None or isinstance(model.encoder.text, PromptEncoder):
        raise ValueError(
            f"{type(model.denoiser).__name__} cannot be customized: Custom Diffusion changes models with one text "
            "encoder, such as Stable Diffusion 1 and 2."
        )
    return model.encoder.text


def customize(model: DiffusionModel, customization: Customization) -> DiffusionModel:
    """Gives a base model the weights and the new words of a customized one, in place.

    Raises:
        ValueError: Weights or embeddings do not belong to this base, or some cross-attention weights are missing.
    """
    text = encoder_of(model)
    parameters = dict(model.denoiser.named_parameters())
    expected = select_weights(model.denoiser, "cross_attention_kv")
    missing = [name for name in expected if name not in customization.weights]
    if missing:
        raise ValueError(
            f"The customized model has {len(expected) - len(missing)} of the {len(expected)} cross-attention K/V "
            f"weights of its base; missing is {missing[0]!r}. Is it another base's, or cut short?"
        )
    copy_into(parameters, customization.weights)
    for word, embedding in customization.embeddings.items():
        add_word(text, word, embedding)
    return model


def save_customized(folder: Path, base: str, model: DiffusionModel, words: list[str]) -> None:
    """Writes what a customized model has of its own: K/V in diffusers' names, each new word, and where its base is.

    All files are safetensors, in the precision that they have. diffusers' own loader takes K/V from its `.bin` files
    only.

    Args:
        folder: Where they go.
        base: Path or hub id of the base model; a path inside or beside the folder may be relative to it.
        model: The customized model.
        words: Its new words.

    Raises:
        StorageError: A file could not be written.
        ValueError: A word is not one token of the model's, or no name of a file.
    """
    if any(Path(word).name != word for word in words):
        raise ValueError(f"The words {words} become names of files: they may hold no slash.")
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {".to_k.weight": "to_k_custom_diffusion.weight", ".to_v.weight": "to_v_custom_diffusion.weight"}
    weights: dict[str, Tensor] = {}
    for name, parameter in select_weights(model.denoiser, "cross_attention_kv").items():
        ending = next(each for each in renamed if name.endswith(each))
        weights[f"{name.removesuffix(ending)}{_PROCESSOR}{renamed[ending]}"] = parameter.detach().cpu().contiguous()
    with replacing(folder / f"{WEIGHTS}.safetensors") as temporary:
        save_file(weights, temporary)
    for word in words:
        with replacing(folder / f"{word}.safetensors") as temporary:
            save_file({word: embedding_of(encoder_of(model), word).cpu()}, temporary)
    write_json(folder / BASE, {"base": base})


def base_of(folder: Path) -> str | None:
    """Path of a customized model's base; None if the folder holds no customized model.

    Raises:
        ValueError: The file that says so is damaged, or the base leads back to the folder.
    """
    base, seen = _named_base(folder), [folder.resolve()]
    following = base
    while following is not None and Path(following).is_dir():
        if Path(following).resolve() in seen:
            raise ValueError(
                f"{folder / BASE} leads back to {Path(following).resolve()}: a customized model's base is another "
                'model. Write where that is: {"base": "path or hub id"}.'
            )
        seen.append(Path(following).resolve())
        following = _named_base(Path(following))
    return base


def _named_base(folder: Path) -> str | None:
    """What a customized model's folder calls its base."""
    file = folder / BASE
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f'{file} should read {{"base": "path or hub id of the base model"}}; it does not.') from error
    if not isinstance(base, str) or not base or "\0" in base:
        raise ValueError(f'{file} should read {{"base": "path or hub id of the base model"}}; its base is {base!r}.')
    beside = folder / base
    return str(beside) if beside.is_dir() else base


@contextmanager
def learned_word(text: CaptionEncoder, number: int, embedding: Float[Tensor, " d"]) -> Iterator[None]:
    """The text encoder with this embedding, which gradients reach, in place of its own of one word; no other moves."""

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((inputs[0] == number)[..., None], embedding.to(output.dtype), output)

    handle = _table(text).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
