"""Frozen parts given by path: a local folder, a hub id, or a model that a Python package carries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from wherefrom.models.adapter_states import adapter_identity
from wherefrom.models.allowed_parts import AUTOENCODER, TEXT_ENCODER, check_part
from wherefrom.models.autoencoders import latent_of
from wherefrom.models.conditioning import Conditioning, concatenated, prompt_embeddings
from wherefrom.models.deciding_settings import deciding_settings, settings_hash
from wherefrom.models.package_paths import resolve_path
from wherefrom.models.pixels import to_float
from wherefrom.models.textual_inversions import expanded, several_vectors
from wherefrom.runtime.artifacts import identity_hash
from wherefrom.runtime.tensor_hash import hash_tensors

_DECODING = ("decoder.", "post_quant_conv.")
Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Evaluation mode and no gradients: what is frozen is neither trained nor averaged."""
    return module.eval().requires_grad_(False)


def longer_than(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> list[int]:
    """Positions of the captions of more tokens than these, the special ones included."""
    if not captions:
        return []
    tokens: Any = tokenizer(list(captions), verbose=False).input_ids
    return [position for position, row in enumerate(tokens) if len(row) > length]


def layers_before_last(model: Any, skip: int) -> int:
    """How many of a CLIP's last layers may be left out, checked.

    Raises:
        ValueError: The model is no CLIP, or has no more layers than that.
    """
    config = model.config
    if not str(config.model_type).startswith("clip"):
        raise ValueError(
            f"clip_skip = {skip} needs a CLIP as text encoder, but the model's is a {type(model).__name__}: leave it "
            "out."
        )
    if not 0 <= skip < config.num_hidden_layers:
        raise ValueError(
            f"clip_skip must lie between 0 and {config.num_hidden_layers - 1}, as the text encoder has "
            f"{config.num_hidden_layers} layers; given {skip}. A1111's 'Clip skip: 2' is 1 here."
        )
    return skip


class CaptionEncoder:
    """Turns captions into prompt embeddings of a fixed length without a mask, as Stable Diffusion does.

    Args:
        model: A transformers text model; its first output is used.
        tokenizer: The tokenizer that belongs to it.
        length: Tokens per caption; shorter captions are padded, longer ones are cut.

    Attributes:
        clip_skip: Last layers that are left out; see `wherefrom.models.clip_skip`.
        writes_out: Words of several vectors are written out, as diffusers' pipelines with textual inversions do.
    """

    clip_skip: int = 0
    writes_out: ClassVar[bool] = True

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.model, self.tokenizer, self.length = freeze(model), tokenizer, length

    @classmethod
    def from_pretrained(cls, path: str, length: int = 77) -> CaptionEncoder:
        """Loads model and tokenizer from a folder, a hub id or `package:NAME/FOLDER`."""
        folder = resolve_path(path)
        return cls(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), length)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def prepared(self, caption: str) -> str:
        """The caption as the pipeline hands it to the tokenizer, words of several vectors apart."""
        return caption

    def skip_layers(self, skip: int) -> None:
        """Leaves out this many of the model's last layers from now on.

        Raises:
            ValueError: The model is no CLIP, or has no more layers than that.
        """
        self.clip_skip = layers_before_last(self.model, skip)

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch_size: int = 64) -> Conditioning:
        """Conditioning of each caption, on the CPU."""
        texts = [self.prepared(caption) for caption in captions]
        starts = range(0, len(texts), batch_size)
        return concatenated([self.embed(texts[start : start + batch_size]).cpu() for start in starts])

    def embed(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of a few captions, on the model's device; gradients reach its trainable parts."""
        tokens = self.tokenizer(
            self.written_out(self.tokenizer, captions),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        numbers = tokens.input_ids.to(self.device)
        if not self.clip_skip:
            return prompt_embeddings(self.model(numbers)[0])
        clip: Any = self.model
        states = clip(numbers, output_hidden_states=True).hidden_states[-(self.clip_skip + 1)]
        return prompt_embeddings(getattr(clip, "text_model", clip).final_layer_norm(states))

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Positions of the captions that are longer than what the model reads, so that their ends are lost."""
        return longer_than(self.tokenizer, self.written_out(self.tokenizer, captions), self.length)

    def written_out(self, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[str]:
        """Captions as a tokenizer takes them."""
        return expanded(tokenizer, captions) if self.writes_out else list(captions)

    def sized(self, size: tuple[int, int]) -> None:
        """Does nothing: the model is not conditioned on the images' (height, width)."""

    def identity(self) -> dict[str, Any]:
        """What decides the embeddings: weights, how strongly adapters count, tokenizer, length, and what is unusual.

        Raises:
            ValueError: The model does not compute what its weights say; see `check_part`.
        """
        check_part(self.model, TEXT_ENCODER)
        words = sorted(self.tokenizer.get_vocab().items())
        return {
            "text_encoder": hash_tensors(self.model.state_dict()),
            "tokenizer": hashlib.blake2b(repr(words).encode(), digest_size=8).hexdigest(),
            "length": self.length,
            **adapter_identity(self.model),
            **self.unusual([self.model], [self.tokenizer]),
            **self._padding(),
        }

    def _padding(self) -> dict[str, Any]:
        """The token that fills captions up, where it is not the usual one of models of this width.

        Stable Diffusion 1 fills up with the end of the caption and 2 (whose encoder is 1024 wide) with an exclamation
        mark; encoders smaller than theirs have either, as they had before this was part of an identity.
        """
        words, end = self.tokenizer, self.tokenizer.eos_token_id
        width = int(getattr(getattr(self.model, "config", None), "hidden_size", None) or 0)
        mark = words.get_vocab().get("!")
        usual = {0} if end is None else {mark} if width == 1024 else {end} if width >= 768 else {end, mark}
        return {} if words.pad_token_id in usual else {"padding": words.pad_token_id}

    def unusual(self, models: Sequence[nn.Module], tokenizers: Sequence[PreTrainedTokenizerBase]) -> dict[str, Any]:
        """What decides the conditioning beside weights, words and lengths, where it is not as it usually is."""
        words = [several_vectors(each) if self.writes_out else [] for each in tokenizers]
        sides = [[each.padding_side, each.truncation_side] for each in tokenizers]
        found: dict[str, tuple[Any, bool]] = {
            "settings": (settings_hash(*models), any(map(deciding_settings, models))),
            "several_vectors": (words, any(words)),
            "sides": (sides, any(side != ["right", "right"] for side in sides)),
            "clip_skip": (self.clip_skip, self.clip_skip != 0),
        }
        return {name: value for name, (value, is_unusual) in found.items() if is_unusual}


class LatentEncoder:
    """Turns images into scaled latents and captions into conditioning.

    Args:
        vae: A diffusers autoencoder, or where to load one from.
        text: A `CaptionEncoder`, or where to load one from.
        length: Tokens per caption, when `text` is a path.

    Raises:
        ValueError: The autoencoder's statistics of latents are half there, or cannot be what is meant.
    """

    def __init__(self, vae: AutoencoderKL | str, text: CaptionEncoder | str, length: int = 77) -> None:
        loaded = (
            AutoencoderKL.from_pretrained(resolve_path(vae), low_cpu_mem_usage=False).float()
            if isinstance(vae, str)
            else vae
        )
        self.vae = freeze(loaded)
        _ = self.statistics  # refuses halves before anything long
        self.text = CaptionEncoder.from_pretrained(text, length) if isinstance(text, str) else text

    @property
    def scale(self) -> tuple[float, float]:
        """(shift, factor): a latent is (z - shift) * factor, of a z that `statistics` has normalized, if there are."""
        config: Any = self.vae.config
        return float(getattr(config, "shift_factor", None) or 0.0), float(config.scaling_factor)

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of each channel, shaped (C, 1, 1), where the autoencoder has them.

        A latent is then (z - mean) / deviation * factor, as diffusers' pipeline of Stable Diffusion XL takes it.

        Raises:
            ValueError: The configuration holds one of the two alone, another number of them, or a shift as well.
        """
        config: Any = self.vae.config
        given = [getattr(config, name, None) for name in ("latents_mean", "latents_std")]
        if given == [None, None]:
            return None
        sizes = [0 if each is None else len(each) for each in given]
        if sizes != [config.latent_channels] * 2 or self.scale[0] or min(given[1] or [0]) <= 0:
            raise ValueError(
                f"{AUTOENCODER} has latents_mean = {given[0]!r} and latents_std = {given[1]!r} in its configuration: "
                f"needed are both, {config.latent_channels} numbers each, deviations above 0, and no shift_factor."
            )
        mean, deviation = (torch.tensor(each, dtype=torch.float64).reshape(-1, 1, 1) for each in given)
        return mean, deviation

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        """The scaled mean latent of images in [-1, 1], on the CPU.

        Raises:
            ValueError: The autoencoder would encode them in tiles.
        """
        parameter = next(self.vae.parameters())
        self._check_tiles("encodes", pixels, "tile_sample_min_size", "pixels")
        shift, factor = self.scale
        mean: Tensor = latent_of(self.vae, pixels.to(parameter.device, parameter.dtype))
        if self.statistics is not None:
            centre, deviation = (each.to(mean) for each in self.statistics)
            mean = (mean - centre) / deviation
        return ((mean - shift) * factor).float().cpu()

    def _check_tiles(self, does: str, given: Tensor, setting: str, of: str) -> None:
        """Refuses tiles, whose edges are blended, where the autoencoder is set to make them and they would be made."""
        tile = getattr(self.vae, setting, 0)
        if getattr(self.vae, "use_tiling", False) and max(given.shape[-2:]) > tile:
            raise ValueError(
                f"{AUTOENCODER} {does} in tiles of {tile} {of}, and the images are larger: the result would not be "
                "that of training. Call `pipeline.vae.disable_tiling()` first."
            )

    def encode_image(self, pixels: UInt8[NDArray[np.uint8], "h w 3"]) -> Float[Tensor, "c i j"]:
        """The scaled mean latent of one image, on the CPU."""
        return self.encode_pixels(to_float(torch.from_numpy(np.array(pixels)))[None])[0]

    @torch.no_grad()
    def decode_images(self, latents: Float[Tensor, "b c i j"]) -> UInt8[NDArray[np.uint8], "b h w 3"]:
        """uint8 images from scaled latents."""
        return ((self.decode(latents).float().cpu() + 1.0) * 127.5).round().byte().movedim(1, -1).numpy()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c i j"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [-1, 1] from scaled latents.

        Raises:
            ValueError: The autoencoder would decode them in tiles.
        """
        self._check_tiles("decodes", latents, "tile_latent_min_size", "latent cells")
        parameter = next(self.vae.parameters())
        shift, factor = self.scale
        scaled = latents.to(parameter.device, parameter.dtype)
        if self.statistics is not None:
            centre, deviation = (each.to(scaled) for each in self.statistics)
            decoded: Tensor = self.vae.decode(scaled * deviation / factor + centre).sample
        else:
            decoded = self.vae.decode((scaled / factor) + shift).sample
        return decoded.clamp(-1, 1)

    def _latents_identity(self) -> dict[str, Any]:
        """What decides latents beside weights and scale, where there is more."""
        statistics, settings = self.statistics, settings_hash(self.vae)
        return {
            **({} if statistics is None else {"statistics": [each.flatten().tolist() for each in statistics]}),
            **({"vae_settings": settings} if settings else {}),
        }

    def identity(self) -> dict[str, Any]:
        """What decides latents and conditioning; the decoder decides neither.

        Raises:
            ValueError: A part does not compute what its weights say; see `check_part`.
        """
        check_part(self.vae, AUTOENCODER)
        weights = self.vae.state_dict().items()
        encoding = {name: value for name, value in weights if not name.startswith(_DECODING)}
        return {
            "vae": hash_tensors(encoding),
            "scale": list(self.scale),
            **self._latents_identity(),
            **self.text.identity(),
        }

    def decoder_identity(self) -> str:
        """What decides the image of a latent."""
        weights, more = self.vae.state_dict().items(), self._latents_identity()
        decoding = hash_tensors({name: value for name, value in weights if name.startswith(_DECODING)})
        return f"{decoding}/{self.scale}{f'/{identity_hash(more)}' if more else ''}"
