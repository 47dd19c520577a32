"""Page of a counterfactual evaluation: curves, table, the images before and after, and what was asked beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from wherefrom.counterfactual.curves import draw_curves
from wherefrom.counterfactual.effect_table import CounterfactualRow, as_table
from wherefrom.counterfactual.generated_images import images_folder, read_strip
from wherefrom.counterfactual.removal import RANDOM
from wherefrom.counterfactual.report_sections import STYLE, explanation, sections, table
from wherefrom.counterfactual.results_file import ALL_IMAGES, COUNTERFACTUAL, SEED_BASELINE, read_results
from wherefrom.reports.html import Markup, tag, write_page
from wherefrom.reports.images import foreign, image_tag, png_data_uri
from wherefrom.runtime.artifacts import replacing
from wherefrom.runtime.measured_cost import Cost

PAGE, CURVES = "counterfactual.html", "counterfactual.png"
_TITLE = "Counterfactual evaluation"
_REQUIRED = ("rows", "models", "prompts", "protocol", "encoder", "training_images")
_STYLE = (
    STYLE
    + "img.curves { max-width: 100%; margin: 1.5rem 0; }"
    + "table.effects td, table.effects th { padding: 0.2em 0.6em; text-align: right; }"
    + "table.effects :is(td, th):first-child, table.replaced :is(td, th) { text-align: left; }"
    + "table.effects:not(.replaced) td { white-space: nowrap; }"
    # A narrow column must not shrink its images, nor prompts be broken word by word.
    + "table.effects td img { max-width: none; } table.effects th:first-child { min-width: 10em; }"
)
_LEAD = (
    "For each generated image, every method named the training images that it owes most to. The model was then trained "
    "again without them. The better a method, the worse the new model knows the generated image."
)
_CURVE, _COSTS = "Same effect as so many random images", "Seconds a query, stored"
_WORDS = {
    "K": "How many of its highest-ranked training images were removed for each generated image.",
    "ΔL": "Increase of the loss: how much worse the retrained model predicts the generated image than the model with "
    "all images does. Larger means that the removed images mattered more.",
    "Matched": "The effect on a generated image whose own images were removed.",
    "Mismatched": "The effect on the same generated image where only those of other ones were. Where one retraining "
    "removes the images of all, it is the effect on images that nothing was removed for, by the same models.",
    "Matched − mismatched": "The number to compare methods by: a method that names images which matter for everything "
    "gains nothing. It assumes that images of other queries do to a query what they do to any.",
    "MSE, similarity": "How far the image that the retrained model draws from the same noise is from the one before: "
    "mean squared error (0 is the same), and cosine similarity of features (1 is the same).",
    RANDOM: "As many images removed at random (grey band): a method should do better.",
    SEED_BASELINE: "What another training seed alone changes, with all images (dashed line): smaller effects may be "
    "chance.",
    _CURVE: "Read off the random-removal curve: models trained without more and more "
    "random images. In brackets a 95 % interval; inf is more than the curve removed.",
    "n, ±": "Number of generated images, and the standard error of the mean over them.",
    _COSTS: "What the method's attributions took, without what it makes once for a model; the "
    "rankings, and everything that the method keeps to make them.",
}


def write_counterfactual_report(folder: Path) -> tuple[Path, Path]:
    """Writes the page of a counterfactual evaluation and the image of its curves.

    Args:
        folder: A run folder of `evaluate.py counterfactual`, of this release or an earlier one.

    Returns:
        The page and the image of the curves.

    Raises:
        ValueError: The folder holds no evaluation, or a file in it cannot be read.
        StorageError: A file could not be written.
    """
    result = read_results(folder / COUNTERFACTUAL, _REQUIRED)
    rows = [CounterfactualRow.from_json(each) for each in result["rows"]]
    costs = {name: Cost(**each) for name, each in result.get("costs", {}).items()}
    curves = draw_curves(rows, costs)
    with replacing(folder / CURVES) as temporary:
        Image.fromarray(curves).save(temporary, "PNG")
    encoder = result["encoder"]
    facts = (
        f"{result['training_images']:,} training images; seeds {', '.join(map(str, result['protocol']['seeds']))}; "
        f"losses on {result['protocol']['timesteps']} timesteps; images drawn from the same noise"
        + (f"; similarity by {encoder}." if encoder else ".")
    )
    body = tag(
        "body",
        tag("header", tag("h1", _TITLE), tag("p", _LEAD, class_="lead"), tag("p", facts, class_="quiet")),
        tag("img", src=png_data_uri(curves), alt="Effects against K, by method", class_="curves"),
        tag("div", _table(rows, costs), class_="scroll"),
        explanation("How to read the table", _words(rows, costs)),
        *sections(folder, result),
        *_images(folder, result),
    )
    write_page(folder / PAGE, _TITLE, body, _STYLE)
    return folder / PAGE, folder / CURVES


def _words(rows: Sequence[CounterfactualRow], costs: Mapping[str, Cost]) -> dict[str, str]:
    """The words that this table has."""
    methods = {row.method for row in rows}
    absent = {name for name in (RANDOM, SEED_BASELINE) if name not in methods}
    absent |= set() if any(row.random_equivalent is not None for row in rows) else {_CURVE}
    absent |= set() if costs else {_COSTS}
    return {word: meaning for word, meaning in _WORDS.items() if word not in absent}


def _table(rows: Sequence[CounterfactualRow], costs: Mapping[str, Cost]) -> Markup:
    lines = [line.strip("| ").split(" | ") for line in as_table(rows, costs).splitlines()]
    return table(lines[0], lines[2:])


def _images(folder: Path, result: Mapping[str, Any]) -> list[Markup]:
    """Each query as the model of all images draws it, and without those that each method named, at the largest K."""
    prompts, seed = result["prompts"], result["protocol"]["seeds"][0]
    largest = max(result["protocol"]["ks"])
    models = [each for each in result["models"] if each["seed"] == seed and each["k"] in (0, largest)]
    images = images_folder(folder)
    files = {each["name"]: images / f"{each['name']}.png" for each in models}
    drawn = {name: read_strip(path, list(prompts)) for name, path in files.items() if path.exists()}
    columns = list(dict.fromkeys(each["method"] for each in models))
    lines = []
    for query in dict.fromkeys(name for each in models for name in each["queries"]):
        cells = []
        for method in columns:
            model = next(
                each
                for each in models
                if each["method"] == method and (method == ALL_IMAGES or query in each["queries"])
            )
            image = drawn.get(model["name"], {}).get(query)
            words = "with all images" if method == ALL_IMAGES else f"without {method}'s images"
            cells.append(tag("td", "–" if image is None else image_tag(image, 64, words)))
        lines.append(tag("tr", tag("th", foreign(prompts[query])), *cells))
    if not lines or not drawn:
        return []
    head = tag("tr", tag("th", ""), *(tag("th", title) for title in columns))
    return [
        tag("h2", f"Images before, and without the {largest} that each method named"),
        tag(
            "p",
            "All are drawn from the same noise. Any retraining changes images a little: what counts is how much more "
            "an image changed than in the column of random images.",
        ),
        tag("div", tag("table", head, *lines, class_="effects"), class_="scroll"),
    ]
