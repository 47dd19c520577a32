"""Interface of a model family; everything else is common to all families.

One family is one file: which networks it is, what they are conditioned on (`conditioning`) and by which text
encoders, how latents are made from pixels, which way the output points, which parameters are keys and values of the
text. `wherefrom.models.families.registry` finds a network's family.

Shape letters: B = batch, C = latent channels, H and W = latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.models.conditioning import Conditioning, Shape, check_declared
from wherefrom.models.encoders import CaptionEncoder, LatentEncoder
from wherefrom.models.image_sizes import latent_sides, reduction_of
from wherefrom.models.noise_schedule import NoiseSchedule, noise_schedule_of

Belongs = Callable[[str], bool]


def of_adapter(name: str) -> bool:
    """Whether a weight belongs to an adapter, by peft's names; `adapter_states` knows those of every kind."""
    return any(kind in name for kind in (".lora_", ".hada_", ".lokr_"))


# Names as in diffusers' U-Nets and PixArt: attn1 is self-attention, attn2 the cross-attention to the text.
CROSS_ATTENTION: Mapping[str, Belongs] = {
    "cross_attention_kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "cross_attention": lambda name: ".attn2." in name,
    "attention": lambda name: ".attn1." in name or ".attn2." in name,
    "all": lambda name: True,
    "adapter": of_adapter,
}

GROUNDED = "it attends to boxes and their phrases too, of which captions say nothing"
# Settings of a U-Net's configuration that need more than a caption and a timestep.
UNET_REFUSED: Mapping[str, str] = {
    "attention_type": GROUNDED,
    "class_embed_type": "it takes classes of images beside the caption",
    "num_class_embeds": "it takes classes of images beside the caption",
    "dual_cross_attention": "it attends to a prompt image beside the caption",
    "time_cond_proj_dim": "it is told the strength of guidance at each pass, as distilled (LCM) models are, which no "
    "training image has. Attribute the model that it was distilled from",
}


@dataclass(frozen=True)
class SavedAs:
    """How a family's models are saved as a diffusers pipeline.

    Attributes:
        pipeline: The pipeline's class.
        network: The network's name in it.
        others: Further entries of its index: parts that it has no use for.
    """

    pipeline: str
    network: str
    others: Mapping[str, Any] = field(default_factory=dict)


class PipelineParts:
    """The parts of a loaded pipeline, of which none that is asked for may be missing.

    Args:
        pipeline: The pipeline.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.components: Mapping[str, Any] = pipeline.components

    @property
    def network(self) -> Any:
        """The part that denoises."""
        return (
            self.components["unet"] if self.components.get("unet") is not None else self.components.get("transformer")
        )

    @property
    def reduction(self) -> int:
        """Pixels of a latent's side."""
        return reduction_of(self.components["vae"])

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the network was made for, until the images' own is known."""
        height, width = latent_sides(self.network)
        return height * self.reduction, width * self.reduction

    def text(self, suffixes: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """Text encoders and tokenizers.

        Args:
            suffixes: Of their names: `text_encoder` and `tokenizer` have none, others `_2`, `_3`.

        Raises:
            ValueError: One is missing.
        """
        names = [f"{part}{suffix}" for suffix in suffixes for part in ("text_encoder", "tokenizer")]
        missing = [name for name in names if self.components.get(name) is None]
        if missing:
            raise self.unsupported(f"It is missing its {' and '.join(missing)}")
        result = [self.components[name] for name in names]
        return result[::2], result[1::2]

    def unsupported(self, why: str) -> ValueError:
        """The error that says why the pipeline is refused."""
        there = ", ".join(name for name, part in self.components.items() if part is not None)
        return ValueError(f"{type(self.pipeline).__name__} is not supported: {why}; it has {there}.")


def token_limit(text: Any, tokenizer: Any) -> int:
    """Tokens of a caption: as the tokenizer says, but no more than the text encoder has positions for."""
    limit = int(tokenizer.model_max_length)  # a huge number where the tokenizer's files do not say
    return min(limit, int(getattr(text.config, "max_position_embeddings", limit)))


class ModelFamily:
    """Base of the families: how a network is called, and what belongs to it.

    Args:
        network: The network.

    Attributes:
        networks: The classes of network that belong to the family.
        description: Names them in messages.
        subsets: Which parameters belong to each subset, by name; see `wherefrom.models.parameter_subsets`.
        saved_as: How models are saved; None where they are only read.
        pipelines: Names of diffusers' pipeline classes that draw from text with such a network; empty takes any.
        refused_settings: Settings of the network's configuration that need what losses do not hand to it, and why.
        learned_variance: Whether the network may say a variance of each value too, which losses leave out.
        latent_statistics: Whether the pipeline takes the autoencoder's `latents_mean` and `latents_std` into account.

    Raises:
        ValueError: The network takes conditioning that is not supported.
    """

    networks: ClassVar[tuple[type[nn.Module], ...]] = ()
    description: ClassVar[str] = ""
    subsets: ClassVar[Mapping[str, Belongs]] = CROSS_ATTENTION
    saved_as: ClassVar[SavedAs | None] = None
    pipelines: ClassVar[tuple[str, ...]] = ()
    refused_settings: ClassVar[Mapping[str, str]] = {}
    learned_variance: ClassVar[bool] = False
    latent_statistics: ClassVar[bool] = False

    def __init__(self, network: nn.Module) -> None:
        self.config: Any = getattr(network, "config", None)
        self.kind = type(network).__name__

    @classmethod
    def accepts(cls, network: nn.Module) -> bool:
        """Whether the network belongs to this family."""
        return isinstance(network, cls.networks)

    def __call__(
        self,
        network: nn.Module,
        noisy: Float[Tensor, "b c h w"],
        times: Tensor,
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """The network's output, pointing as the noise schedule's prediction says.

        Args:
            network: The network, with whatever weights it has now.
            noisy: x_t.
            times: Time input of the network.
            conditioning: Conditioning of the captions.
        """
        raise TypeError(f"{type(self).__name__} does not define how its network is called.")

    def conditioning(self) -> Mapping[str, Shape]:
        """Name -> shape of one caption's conditioning tensors; None is any length."""
        raise TypeError(f"{type(self).__name__} does not declare its network's conditioning.")

    def check(self, latent: tuple[int, int, int], conditioning: Conditioning) -> None:
        """Refuses latents and conditioning that the network cannot take, before anything long.

        Args:
            latent: (C, H, W).
            conditioning: Of one caption.

        Raises:
            ValueError: The number of channels, a side, a name or a shape is wrong.
        """
        channels = getattr(self.config, "in_channels", latent[0])
        if latent[0] != channels:
            raise ValueError(
                f"The latents have {latent[0]} channels, but the model takes {channels}: they were made by another "
                "autoencoder than the model's. Encode the images with the model's own."
            )
        self.check_sides(*latent[1:])
        check_declared(conditioning, self.conditioning(), self.kind)

    @property
    def patch(self) -> int:
        """Latent cells of which each side of a latent must be a multiple."""
        return 1

    def check_sides(self, rows: int, columns: int) -> None:
        """Refuses latents of a height and width that the network cannot take; a U-Net takes any.

        Raises:
            ValueError: A side is no multiple of the patch, or is longer than there are positions.
        """

    def prompt_encoder(self, parts: PipelineParts) -> CaptionEncoder:
        """The encoder that turns captions into the network's conditioning.

        Raises:
            ValueError: A text encoder is missing.
        """
        raise TypeError(f"{type(self).__name__} does not define its prompt encoder.")

    def latent_encoder(self, parts: PipelineParts) -> LatentEncoder:
        """The encoder of images into latents and of captions into conditioning.

        Raises:
            ValueError: A text encoder is missing.
        """
        return LatentEncoder(parts.components["vae"], self.prompt_encoder(parts))

    def noise_schedule(self, scheduler: SchedulerMixin) -> NoiseSchedule:
        """The forward process, and which way the network's output points.

        Raises:
            ValueError: The scheduler is not supported.
        """
        return noise_schedule_of(scheduler)


class TransformerFamily(ModelFamily):
    """A transformer over patches of the latents."""

    @property
    def patch(self) -> int:
        """See `ModelFamily`."""
        return int(self.config.patch_size)

    def check_sides(self, rows: int, columns: int) -> None:
        """See `ModelFamily`; the sides must be whole patches, and no more than the model has positions for."""
        patch, most = self.patch, getattr(self.config, "pos_embed_max_size", None)
        for side in (rows, columns):
            if side % patch or (most is not None and side > most * patch):
                limit = "" if most is None else f", and no more than {most * patch}"
                raise ValueError(
                    f"The latents are {rows} × {columns}, but their sides must be multiples of {patch}, the "
                    f"side of a patch{limit}. Choose another size of the images."
                )
