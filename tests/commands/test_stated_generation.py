"""A query's own metadata, from the file to the page: what is used, what is shown, and what is another model's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin

from tests.support.tiny import tiny_model
from tests.support.user_world import UserWorld, user_world
from wherefrom.api import AttributionOptions, attribute_images
from wherefrom.cli import main
from wherefrom.commands.stated_generation import checked_queries
from wherefrom.models.adapter_states import AdapterRecord, note_adapter
from wherefrom.queries.generation_metadata import GenerationMetadata
from wherefrom.queries.own_prompts import with_prompt
from wherefrom.queries.sources import QueryImage, QuerySource
from wherefrom.queries.types import Query

PROMPT = "a red square <script>alert(1)</script>"
INFOTEXT = (
    f"{PROMPT} <lora:busStyle:0.8>\nNegative prompt: blurry & <b>bad</b>\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 8x8, Model hash: 6ce0161689, Model: <i>v1-5</i>"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> UserWorld:
    made = user_world(tmp_path_factory.mktemp("stated"))
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", INFOTEXT)
    with Image.open(made.generated) as image:
        image.save(made.generated, pnginfo=info)
    return made


def test_the_prompt_is_the_files_own_unless_one_is_given(world: UserWorld, tmp_path: Path) -> None:
    options = AttributionOptions(store=tmp_path / "store", progress=False)
    with Image.open(world.generated) as opened:
        pixels = np.asarray(opened.convert("RGB"))
        asked = [(world.generated, None), (opened, None)]
        results = attribute_images(world.model, world.images, asked, "pixel", options)
        queries = [each.query for each in results]
    assert [query.prompt for query in queries] == [PROMPT, PROMPT]
    assert all(query.own_prompt for query in queries)
    for prompt in ("a fox", ""):
        (given,) = attribute_images(world.model, world.images, [(world.generated, prompt)], "pixel", options)
        assert (given.query.prompt, given.query.own_prompt) == (prompt, False)
        assert given.query.metadata is not None
        page = given.save_report(tmp_path / "page.html").read_text()
        assert "The prompt is another than the one that the image file states." in page
    (unknown,) = attribute_images(world.model, world.images, [(pixels, None)], "pixel", options)
    assert (unknown.query.prompt, unknown.query.metadata) == ("", None)
    with pytest.raises(ValueError, match=r"neither a prompt nor an \(image, prompt\) pair.*None takes the one"):
        attribute_images(world.model, world.images, [(world.generated, 3)], "pixel", options)  # type: ignore[list-item]


def test_one_line_uses_says_shows_and_keeps_it(
    world: UserWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["attribute", *world.words, "--query", str(world.generated), "--method", "pixel", "--output", "run"]
    main(words)
    printed = capsys.readouterr()
    assert f"from its own web UI settings (AUTOMATIC1111), PNG text 'parameters': {PROMPT!r}" in printed.err
    assert "LoRAs 'busStyle', which are not known to be in this model (it has none)" in printed.err
    record = yaml.safe_load(Path("run/wherefrom.yaml").read_text())
    (stated,) = record["stated"].values()
    assert stated["prompt"] == PROMPT
    assert stated["settings"]["Seed"] == "965400086"
    assert "prompt" not in record["queries"][0]
    manifest = json.loads(Path("run/manifest.json").read_text())
    (kept,) = manifest["stated"].values()
    assert (kept["prompt_is_used"], kept["negative"]) == (True, "blurry & <b>bad</b>")
    assert manifest["identity"]["queries"][0][1] == PROMPT

    def check(page: str) -> None:
        assert "What the image says of itself" in page
        assert "No prompt was given: the image&#x27;s own is used" in page or "the image's own is used" in page
        assert "blurry &amp; &lt;b&gt;bad&lt;/b&gt;" in page
        assert "the loss knows no negative prompt" in page
        assert "which are not known to be in this model" in page
        for raw in ("<script>", "<b>bad", "<i>v1-5"):
            assert raw not in page

    first = Path("run/report.html").read_text()
    check(first)
    main(["attribute", "-c", "run/wherefrom.yaml", "--output", "run"])
    assert "query 1 of 1 is done" not in capsys.readouterr().err
    Path("run/report.html").unlink()
    main(["report", "run"])
    check(Path("run/report.html").read_text())
    with pytest.raises(ValueError, match="--output run holds another run"):
        main([*words, "--prompt", "a fox"])


def of_image(path: Path, prompt: str | None, **stated: str) -> Query:
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a bus <lora:bus Style:0.8> <lora:night:1>\nSteps: 1, Seed: 2, "
        + ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in stated.items()),
    )
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return with_prompt(Query("q", "", np.zeros((8, 8, 3), np.uint8)), path, prompt)


def notes_of(query: Query, checkpoint: Path | None = None, adapters: tuple[str, ...] = ()) -> tuple[str, ...]:
    model = tiny_model()
    for name in adapters:
        note_adapter(model.denoiser, AdapterRecord(name, ""))
    said: list[str] = []
    (checked,) = checked_queries([query], model, checkpoint=checkpoint, log=said.append)
    assert checked.metadata is not None
    assert [line for line in said if line.startswith("q: ")] == [f"q: {note}" for note in checked.metadata.notes]
    return checked.metadata.notes


def test_a_hash_that_is_another_models_is_said(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    content = np.random.default_rng(0).bytes(0x100000 + 0x20000)
    file.write_bytes(content)
    whole = hashlib.sha256(content).hexdigest()
    old = hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    both = ("bus_style.safetensors", "loras/night.safetensors")
    for right in (whole[:10], whole[:10].upper(), whole, old):
        assert notes_of(of_image(tmp_path / "q.png", None, Model_hash=right), file, both) == ()
    for wrong in ("6ce0161689", "6ce01616", "0" * 64):
        (note,) = notes_of(of_image(tmp_path / "q.png", "given", Model_hash=wrong, Model="other"), file, both)
        assert f"a model of hash {wrong} (other), and model.safetensors has" in note
    assert notes_of(of_image(tmp_path / "q.png", None, Model_hash="6ce0161689"), None, both) == ()
    assert notes_of(of_image(tmp_path / "q.png", None, Model_hash="blake3:aa"), file, both) == ()


def test_loras_that_are_not_in_the_model_are_said(tmp_path: Path) -> None:
    query = of_image(tmp_path / "q.png", None)
    (note,) = notes_of(query, None, ("Bus-Style.safetensors",))
    assert "LoRAs 'night', which are not known to be in this model (it has Bus-Style.safetensors)" in note
    (note,) = notes_of(query)
    assert "'bus Style', 'night'" in note


def test_the_laboratorys_queries_read_it_too(world: UserWorld) -> None:
    from wherefrom.models.pipeline import load_model
    from wherefrom.queries.sources import make_queries

    model = load_model(str(world.model))
    source = QuerySource(images=[QueryImage(str(world.generated))])
    (query,) = make_queries(model, source=source, latent_shape=(4, 4, 4), size=(8, 8))
    assert (query.prompt, query.own_prompt) == (PROMPT, True)
    assert isinstance(query.metadata, GenerationMetadata)
