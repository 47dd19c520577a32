"""Are a model's images recognisable? Draws training prompts and judges them beside the real images.

    python -m experiments.recognisability --weights weights/emoji --prompts 100 --seed 0

Prints how often the prompt is among the top 5 (and 1) of 100 captions, for the real and for the generated images, and
saves a contact sheet to look at.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from experiments.alignment import AlignmentJudge, Rate, rate, rate_ratio
from experiments.support.data import choose_prompts
from wherefrom.data.emoji import EmojiOptions, build_emoji
from wherefrom.data.image_set import ImageSet
from wherefrom.features.base import EfficientNetLite0Encoder, MiniLMEncoder, Pixels
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.models.sampling import sample
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store, replacing

Draw = Callable[[list[str]], UInt8[NDArray[np.uint8], "n h w 3"]]


@dataclass(frozen=True)
class Recognisability:
    """How recognisable a model's images are, beside the real images of the same prompts.

    Attributes:
        ids: The prompts' training images.
        prompts: Their captions.
        real: The training images.
        generated: What was drawn for the prompts.
        real_ranks: Rank of the prompt, judged from the real image.
        generated_ranks: Rank of the prompt, judged from the generated image.
        alphas: The ridge strength of each fold.
    """

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    real: UInt8[NDArray[np.uint8], "n h w 3"]
    generated: UInt8[NDArray[np.uint8], "n h w 3"]
    real_ranks: Int64[NDArray[np.int64], " n"]
    generated_ranks: Int64[NDArray[np.int64], " n"]
    alphas: tuple[float, ...]

    def rates(self, top: int) -> tuple[Rate, Rate, Rate]:
        """(rate on real images, rate on generated images, their ratio) of prompts within the first `top`."""
        real, generated = self.real_ranks <= top, self.generated_ranks <= top
        return rate(real), rate(generated), rate_ratio(generated, real)


def recognisability(
    judge: AlignmentJudge, *, images: ImageSet, draw: Draw, count: int = 100, seed: int = 0, among: int = 100
) -> Recognisability:
    """Draws training prompts and ranks each among `among` captions, from the drawn and from the real image.

    Args:
        judge: Fitted on the real images.
        images: All images of the world; prompts are taken from its training split.
        draw: Draws one uint8 RGB image for each prompt.
        count: Number of prompts; a multiple of `among`.
        seed: Which prompts.
        among: Captions that a prompt is ranked among; further prompts form further blocks of that size.

    Raises:
        ValueError: `count` is not a multiple of `among`, or `draw` returned another number of images.
    """
    if count < 1 or count % among:
        raise ValueError(f"{count} prompts cannot be ranked in blocks of {among}; ask for a multiple of {among}.")
    rows = choose_prompts(images, count, seed)
    chosen = images.subset(rows)
    prompts = [captions[0] for captions in chosen.captions]
    generated = draw(prompts)
    if len(generated) != count:
        raise ValueError(f"draw returned {len(generated)} images for {count} prompts.")
    concepts, styles = chosen.columns["concept"], chosen.columns.get("style", ("",) * count)

    def ranks(pixels: Pixels) -> NDArray[np.int64]:
        blocks = [slice(start, start + among) for start in range(0, count, among)]
        return np.concatenate([judge.ranks(pixels[block], concepts[block], styles[block]) for block in blocks])

    return Recognisability(
        chosen.ids,
        tuple(prompts),
        np.asarray(chosen.pixels),
        generated,
        ranks(np.asarray(chosen.pixels)),
        ranks(generated),
        judge.chosen_alphas,
    )


def contact_sheet(result: Recognisability, columns: int = 10, cell: int = 72) -> Image.Image:
    """Each generated image above the real one of its prompt; a green bar marks what was recognised (top 5)."""
    pad, text_height, bar = 6, 26, 3
    pitch_x, pitch_y = cell + pad, 2 * (cell + bar + 2) + text_height + pad
    rows = -(-len(result.ids) // columns)
    sheet = Image.new("RGB", (columns * pitch_x + pad, rows * pitch_y + pad), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    pairs = ((result.generated, result.generated_ranks), (result.real, result.real_ranks))
    for index, prompt in enumerate(result.prompts):
        left, top = pad + index % columns * pitch_x, pad + index // columns * pitch_y
        for pixels, ranks in pairs:
            image = Image.fromarray(np.asarray(pixels[index])).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(image, (left, top))
            colour = "limegreen" if ranks[index] <= 5 else "lightgrey"
            canvas.rectangle((left, top + cell, left + cell - 1, top + cell + bar - 1), fill=colour)
            top += cell + bar + 2
        canvas.text((left, top), f"{prompt[:14]}\n{prompt[14:28]}", fill="black", font=font, spacing=1)
    return sheet


def drawing_with(
    model: DiffusionModel, *, seed: int, steps: int, guidance: float, batch_size: int = 50, eta: float = 0.0
) -> Draw:
    """Draws prompts with a model from keyed noise.

    Args:
        model: The model; its encoder must be set.
        seed: Seed of the noise.
        steps: DDIM steps.
        guidance: Classifier-free guidance; 1 is none.
        batch_size: Images drawn at a time.
        eta: Share of the posterior's noise that each step adds back; 0 is DDIM.

    Raises:
        ValueError: The model has no encoder.
    """
    encoder = model.encoder
    if encoder is None:
        raise ValueError("The model has no encoder, so it cannot draw prompts.")
    config: Any = model.denoiser.config
    shape = (config.in_channels, config.sample_size, config.sample_size)

    def draw(prompts: list[str]) -> NDArray[np.uint8]:
        empty = encoder.text.encode([""]).at(0)
        drawn = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            keys = keyed_random.combine(seed, keyed_random.hash_texts(batch))
            latents = sample(
                model,
                conditioning=encoder.text.encode(batch),
                empty=empty,
                keys=keys,
                shape=shape,
                steps=steps,
                guidance=guidance,
                eta=eta,
            )
            pixels = encoder.decode(latents).float().cpu()
            drawn.append(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy())
        return np.concatenate(drawn)

    return draw


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", required=True, help="pipeline folder or hub id of the model")
    parser.add_argument("--prompts", type=int, default=100, help="number of training prompts, a multiple of 100")
    parser.add_argument("--seed", type=int, default=0, help="which prompts, and the noise that they are drawn from")
    parser.add_argument(
        "--concepts",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        help="prompts of these concepts only, as shares of all (emoji-1k: 0 0.32)",
    )
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance")
    parser.add_argument("--eta", type=float, default=0.0, help="share of noise added back at each step; 0 is DDIM")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where images and features are kept")
    parser.add_argument(
        "--sheet", type=Path, default=Path("runs/recognisability.png"), help="where the contact sheet goes"
    )
    options = parser.parse_args(arguments)

    store = Store(options.cache)
    drawn_images = build_emoji(store, EmojiOptions())
    images, texts = EfficientNetLite0Encoder.from_pretrained(), MiniLMEncoder.from_pretrained()
    print(f"judge: features of {len(drawn_images)} images (kept in {options.cache})", flush=True)
    judge = AlignmentJudge(images, texts=texts, store=store).fit(
        drawn_images, lambda done, total: print(f"  {done} of {total}", flush=True)
    )
    model = load_model(options.weights)
    draw = drawing_with(model, seed=options.seed, steps=options.steps, guidance=options.guidance, eta=options.eta)
    asked = build_emoji(store, EmojiOptions(concepts=tuple(options.concepts)))
    result = recognisability(judge, images=asked, draw=draw, count=options.prompts, seed=options.seed)
    with replacing(options.sheet) as temporary:
        contact_sheet(result).save(temporary, format="PNG")
    print(summary(result))
    print(f"look: {options.sheet}")


def summary(result: Recognisability) -> str:
    """The rates as a small table, and what judged them."""
    lines = [f"{'':>8}{'real':>26}{'generated':>26}{'generated / real':>26}"]
    for top in (5, 1):
        real, generated, ratio = result.rates(top)
        lines.append(f"{f'top {top}':>8}{real!s:>26}{generated!s:>26}{ratio.value:>18.2f} ± {ratio.error:.2f}")
    lines.append(f"judge: EfficientNet-lite0 to MiniLM, ridge strength of each fold {result.alphas}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
