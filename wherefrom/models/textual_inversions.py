"""Textual inversions (Gal et al. 2022): words that a pipeline learned, of one vector or of several.

A word of several vectors is several tokens: `<cat>` stands for `<cat> <cat>_1 <cat>_2`, and diffusers' pipelines of
Stable Diffusion 1, 2 and XL write it out before they tokenize a prompt. So do we, for prompts and captions alike.

A pipeline's folder may hold such words beside its parts, in one file each; nothing in them is run:

- `learned_embeds.safetensors` as diffusers' scripts save it, or any other name: {word: vectors};
- {`emb_params`: vectors}, as A1111 saves it, and {`clip_l`: vectors, `clip_g`: vectors} for both text encoders of SDXL:
  the file's name is the word;
- `.bin` and `.pt` of the first form, or with A1111's `string_to_param` and `name`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_A1111, _BOTH = "emb_params", ("clip_l", "clip_g")
_PICKLED = (".bin", ".pt")
_LEARNED, _CUSTOM = "learned_embeds", "pytorch_custom_diffusion_weights"
_WEIGHT_NAMES = (".weight", ".bias", ".alpha")  # ends of names in files of weights and adapters
_MOST = 256  # vectors of a word; a text encoder reads 77 tokens
_SMALL = 1 << 25  # bytes; a larger pickled file is no word
_TRAINING = ("optimizer", "scheduler", "scaler", "random_states", "training_args")  # what trainers leave beside a model


@dataclass(frozen=True)
class TextualInversion:
    """A learned word.

    Attributes:
        word: How captions and prompts say it.
        vectors: For each of the pipeline's text encoders that it was learned for, by number (0 is the first).
    """

    word: str
    vectors: Mapping[int, Float[Tensor, "n d"]]


def expanded(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[str]:
    """Captions with each word of several vectors written out, as diffusers' pipelines do."""
    if not several_vectors(tokenizer):
        return list(captions)
    added: Any = tokenizer.added_tokens_encoder
    return [_expanded(tokenizer, caption, added) for caption in captions]


def _expanded(tokenizer: PreTrainedTokenizerBase, caption: str, added: Mapping[str, int]) -> str:
    for token in dict.fromkeys(tokenizer.tokenize(caption)):  # in their order, so that every process replaces alike
        if token in added:
            count = 1
            while f"{token}_{count}" in added:
                count += 1
            caption = caption.replace(token, " ".join([token, *(f"{token}_{index}" for index in range(1, count))]))
    return caption


def several_vectors(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's words of several vectors."""
    added: Any = tokenizer.added_tokens_encoder
    return sorted(token for token in added if f"{token}_1" in added)


def _names_and_shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """What a safetensors file holds, from its header; None where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _is_vectors(shape: tuple[int, ...]) -> bool:
    return 1 <= len(shape) <= 2 and (len(shape) == 1 or shape[0] <= _MOST)


def is_textual_inversion(path: Path) -> bool:
    """Whether a `.safetensors` file holds a learned word, by the names and shapes in its header alone."""
    shapes = _names_and_shapes(path) if path.suffix == ".safetensors" and path.is_file() else None
    if not shapes or not all(map(_is_vectors, shapes.values())):
        return False
    return not any(name.endswith(_WEIGHT_NAMES) or ".lora" in name for name in shapes)


def _is_pickled_inversion(path: Path) -> bool:
    """Whether a pickled file holds a learned word: by its name, or because it is small and reads as one."""
    if path.name.startswith((_LEARNED, "<")):
        return True
    if path.stat().st_size > _SMALL or path.name.startswith(_TRAINING):
        return False
    content = _read(path)
    return "string_to_param" in content or all(
        isinstance(value, Tensor) and _is_vectors(tuple(value.shape)) and not name.endswith(_WEIGHT_NAMES)
        for name, value in content.items()
    )


def inversion_files(folder: Path) -> list[Path]:
    """The files of learned words in a pipeline's folder, by name; of a word's training, only the last."""
    files = [path for path in folder.glob("*.safetensors") if is_textual_inversion(path)]
    safe = {path.stem for path in files}  # diffusers' scripts write the same word in both forms
    pickled = [path for suffix in _PICKLED for path in folder.glob(f"*{suffix}") if path.stem not in safe]
    files += [path for path in pickled if _is_pickled_inversion(path)]
    if any(path.stem == _LEARNED for path in files):
        files = [path for path in files if not path.stem.startswith(f"{_LEARNED}-steps-")]
    return sorted(files)


def read_inversions(path: Path) -> list[TextualInversion]:
    """The learned words of a file; nothing is unpickled but tensors.

    Raises:
        ValueError: The file is damaged, or of another layout.
    """
    content = _read(path)
    if "string_to_param" in content:
        word, table = content.get("name"), content["string_to_param"]
        vectors = table.get("*") if isinstance(table, Mapping) else None
        content = {str(word or path.stem): vectors}
    elif set(content) & {*_BOTH, _A1111}:
        if _A1111 in content and len(content) == 1:
            content = {path.stem: content[_A1111]}
        elif set(content) == set(_BOTH):
            each = {number: _vectors(path, name, content[name]) for number, name in enumerate(_BOTH)}
            return [TextualInversion(path.stem, each)]
        else:
            raise ValueError(
                f"{path} should hold {_A1111} alone, or {' and '.join(_BOTH)}; it holds {', '.join(content)}."
            )
    return [TextualInversion(word, {0: _vectors(path, word, value)}) for word, value in sorted(content.items())]


def _vectors(path: Path, word: str, value: Any) -> Float[Tensor, "n d"]:
    if not isinstance(value, Tensor) or not _is_vectors(tuple(value.shape)) or not value.is_floating_point():
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{path}: {word!r} should be the vectors of a learned word, at most {_MOST} of them; found {found}. "
            "If it is no textual inversion, move it out of the pipeline's folder."
        )
    if not bool(value.isfinite().all()):
        raise ValueError(f"{path}: the vectors of {word!r} hold infinities or no numbers.")
    return value.detach().reshape(-1, value.shape[-1])


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            content = torch.load(path, "cpu", weights_only=True, mmap=False)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a textual inversion, and nothing else in it is run: {error}. Save it as "
            "safetensors, or move it out of the pipeline's folder."
        ) from error
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise ValueError(
            f"{path} should hold the vectors of learned words by name; move it out of the folder if it does not."
        )
    return content


def load_inversions(pipeline: Any, folder: Path) -> list[str]:
    """Teaches a pipeline the learned words in its folder, by its own loader; returns the words.

    Raises:
        ValueError: A file is damaged, the pipeline knows no textual inversions, a word is known already with other
            vectors, or its vectors are of another text encoder.
    """
    custom = sorted(folder.glob(f"{_CUSTOM}.*"))
    if custom:
        raise ValueError(
            f"{custom[0]} stands beside a whole pipeline, which does not read it. Put it and its new words into a "
            'folder of their own with a customized.json that says {"base": "where the pipeline is"}, and give that '
            "folder."
        )
    files = inversion_files(folder)
    if files and not isinstance(pipeline, TextualInversionLoaderMixin):
        raise ValueError(
            f"{files[0]} holds a textual inversion, but a {type(pipeline).__name__} reads none. Move it out of the "
            "pipeline's folder if the images were made without it."
        )
    words = []
    for path in files:
        for inversion in read_inversions(path):
            for number, vectors in inversion.vectors.items():
                _teach(pipeline, path, inversion.word, vectors, number if len(inversion.vectors) > 1 else None)
            words.append(inversion.word)
    return words


def _teach(pipeline: Any, path: Path, word: str, vectors: Float[Tensor, "n d"], number: int | None) -> None:
    """Adds one word to one of the text encoders: this one, or the first whose embeddings are as wide."""
    suffixes = [each for each in ("", "_2") if getattr(pipeline, f"text_encoder{each}", None) is not None]
    models: list[Any] = [getattr(pipeline, f"text_encoder{each}") for each in suffixes]
    widths, width = [int(each.get_input_embeddings().weight.shape[-1]) for each in models], int(vectors.shape[-1])
    fitting = [place for place in range(len(widths)) if widths[place] == width and number in (None, place)]
    if not fitting:
        wanted = widths if number is None else widths[number : number + 1]
        raise ValueError(
            f"{path}: the vectors of {word!r} have {width} numbers, but this pipeline's text encoders have "
            f"{' and '.join(map(str, wanted)) or 'no second one'}: the word was learned with another model. Move the "
            "file out of the pipeline's folder."
        )
    model, tokenizer = models[fitting[0]], getattr(pipeline, f"tokenizer{suffixes[fitting[0]]}")
    names = [word, *(f"{word}_{index}" for index in range(1, len(vectors)))]
    if any(name in tokenizer.get_vocab() for name in names):
        rows = torch.tensor(tokenizer.convert_tokens_to_ids(names))
        table = model.get_input_embeddings().weight.detach().cpu()
        if torch.equal(table[rows], vectors.to(table.dtype)):  # saved as a whole pipeline, and alone
            return
        raise ValueError(
            f"{path}: the pipeline knows the word {word!r} already, with other vectors. Which of them drew the images? "
            "Move the file out of the pipeline's folder, or use a pipeline without the word."
        )
    with torch.random.fork_rng(devices=[]):  # rows are drawn at random before they are replaced
        pipeline.load_textual_inversion({word: vectors}, tokenizer=tokenizer, text_encoder=model)
