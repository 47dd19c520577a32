"""How images are attributed: the options of the library's short way in and of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wherefrom.data.framing import AnySize, Framing, sides_of
from wherefrom.data.image_set import ImageSet
from wherefrom.data.layouts.base import CaptionLines, ReadingOptions
from wherefrom.data.on_error import OnError, checked
from wherefrom.data.ranked_images import RankedImages
from wherefrom.models.adapter_sources import AdapterInput
from wherefrom.queries.sources import QueryRegion


@dataclass(frozen=True)
class AttributionOptions:
    """How images are attributed.

    Attributes:
        settings: Values that replace the method's own, such as `{"unlearning.noise_samples": 500}`.
        quick: A first look: few timesteps and noise samples.
        lora: Adapters that are added to a model that is given by its path or hub id: a file, a folder or a hub id, as
            `"style.safetensors"`, `"style.safetensors:0.8"` or `("style.safetensors", 0.8)`.
        store: Folder for what is computed once.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; None takes CUDA where there is one.
        resize: Bring query images to the model's size instead of refusing other sizes.
        regions: Parts of the queries (`of` names the file or the prompt), each scored after its whole image.
        base: The pipeline (folder, hub id or single file) that a model was trained from, where the model is a trainer's
            checkpoint or a single file that lacks parts or settings; they are taken from it.
        caption: Name of the caption column of the folder's metadata, or suffix of its caption files; None finds it.
        seed: Seed of images that are drawn from prompts.
        sampling_steps: Sampling steps of these.
        guidance: Classifier-free guidance of these.
        eta: 0 is DDIM; 1 with all timesteps is DDPM.
        clip_skip: Captions and prompts are read this many layers before CLIP's last, as diffusers counts.
        progress: Show on stderr what is being done, and bars.
        size: Size of all images, queries and training images alike: the side of a square, or (height, width); None is
            the model's own.
        framing: How images are brought to it: padding, aspect buckets, EXIF, transparency.
        on_error: `skip` leaves out training images that cannot be read; `stop` refuses them.
        split: Splits whose images are ranked, one or several, or `all`; without any, `train` where the images have
            splits and all images where they have none.
        layout: Layout of the folder: `imagefolder`, `sidecar`, `kohya`, …; None finds it.
        one_caption: The caption of all images of a folder without captions; it may be empty.
        trigger: What stands for `[trigger]` in captions.
        caption_lines: What the lines of a caption file are: `each`, `first` or `whole`.
        image_column: Name of the column of images, in a table that has several.
        null: Images that the model was never trained on, which p-values are measured against: the name of a split, a
            folder of images, images, or `none`; "" is the images' own split `validation` where they have one.

    Raises:
        ValueError: A value is out of range.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    lora: Sequence[AdapterInput] = ()
    store: str | Path = "cache"
    device: str | None = None
    resize: bool = False
    regions: Sequence[QueryRegion] = ()
    base: str | Path | None = None
    caption: str | None = None
    seed: int = 0
    sampling_steps: int = 50
    guidance: float = 2.0
    eta: float = 0.0
    clip_skip: int = 0
    progress: bool = True
    size: AnySize | None = None
    framing: Framing = Framing()
    on_error: OnError = "stop"
    split: str | Sequence[str] = ()
    null: str | Path | ImageSet = ""
    layout: str | None = None
    one_caption: str | None = None
    trigger: str | None = None
    caption_lines: CaptionLines | None = None
    image_column: str | None = None

    def __post_init__(self) -> None:
        checked(self.on_error)
        _ = self.reading
        if self.size is not None:
            sides_of(self.size)
        if self.sampling_steps < 1:
            raise ValueError(f"sampling_steps must be at least 1; given {self.sampling_steps}.")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be a number from 0 on; given {self.guidance}.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie between 0 and 1; given {self.eta}.")
        if self.clip_skip < 0:
            raise ValueError(f"clip_skip must be a number from 0 on; given {self.clip_skip}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a number from 0 on, below 2^63; given {self.seed}.")

    @property
    def reading(self) -> ReadingOptions:
        """How folders of images are read."""
        return ReadingOptions(
            self.layout,
            self.caption,
            one_caption=self.one_caption,
            trigger=self.trigger,
            caption_lines=self.caption_lines,
            image_column=self.image_column,
            cache=self.store,
        )

    @property
    def choice(self) -> RankedImages:
        """Which images are ranked, and which are the null."""
        return RankedImages.of_options(self.split, self.null)
