"""`--lora`: from a file, a base and a folder of images to a ranking that names the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import adapters as made_up
from tests.support.adapters import kohya, made, save, targets
from tests.support.user_world import SET, UserWorld
from wherefrom.api import AttributionOptions, attribute_images, open_model
from wherefrom.cli.entry import main
from wherefrom.cli.run_file import Request, claim, completed, record_of
from wherefrom.models.pipeline import LORA, load_model, load_pipeline

WORDS = (".attn2.to_k", ".attn2.to_v")


@pytest.fixture(scope="module")
def style(world: UserWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = made(targets(load_model(str(world.model)).denoiser, WORDS), made_up.lora)
    return save(tmp_path_factory.mktemp("lora") / "my style.safetensors", kohya(layers))


def manifest(run: Path) -> Any:
    return json.loads((run / "manifest.json").read_text())


def test_from_an_adapters_file_to_a_ranking_that_names_it(
    world: UserWorld, style: Path, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            *["attribute", *world.words, *world.query, "--lora", f"{style}:0.8", "--output", "run"],
            *["--set", "weights=adapter", *SET],
        ]
    )
    assert "with LoRA my style.safetensors at 0.8 (" in capsys.readouterr().err
    record = yaml.safe_load((empty / "run" / "wherefrom.yaml").read_text())
    assert record["lora"] == [f"{style}:0.8"]
    assert str(style) in record["inputs"]
    (adapter,) = manifest(empty / "run")["adapters"]
    assert (adapter["name"], adapter["weight"], adapter["fused"]) == ("my style.safetensors", 0.8, False)
    assert "with LoRA my style.safetensors at 0.8 (" in (empty / "run" / "report.html").read_text()
    assert (empty / "run" / "ranking.parquet").is_file()
    main(["report", "run", "--title", "again"])
    assert "with LoRA my style.safetensors at 0.8 (" in (empty / "run" / "report.html").read_text()


def test_the_model_with_an_adapter_is_the_folder_with_it_beside(world: UserWorld, style: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(world.model, tmp_path / "pipeline"))
    shutil.copy(style, whole / LORA)
    given = open_model(str(world.model), [str(style)])
    assert given.fingerprint() == open_model(whole).fingerprint()
    weighed = open_model(world.model, [(style, 0.8)])
    assert weighed.fingerprint() == open_model(world.model, [f"{style}:0.8"]).fingerprint() != given.fingerprint()


def test_budget_and_comparison_take_adapters_too(
    world: UserWorld, style: Path, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*world.words, *world.query, "--lora", str(style), "--set", "weights=adapter", *SET]
    main(["budget", "attribute", *words])
    assert "measured on one device" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^--lora: there is no file 'none.safetensors'"):
        main(["budget", "attribute", *words, "--lora", "none.safetensors"])
    main(["compare", *words, "--method", "abu_plus", "--output", "both"])
    assert manifest(empty / "both" / "abu_plus")["adapters"][0]["name"] == "my style.safetensors"


def test_another_weight_is_another_run(world: UserWorld, style: Path, empty: Path) -> None:
    def request(lora: str) -> Request:
        queries = ({"prompt": "a red square"},)
        return completed(
            Request(model=str(world.model), images=str(world.images), queries=queries, lora=(lora,), output="run")
        )

    claim(request(str(style)), write=True)
    claim(request(f"{style}:1"), write=True)
    with pytest.raises(ValueError, match=r"--output run holds another run: lora is .* there and .*0.8'\] here"):
        claim(request(f"{style}:0.8"), write=True)
    record = record_of(request(str(style)))
    save(style.with_name("other.safetensors"), {"x.lora_A.weight": torch.ones(1, 1)})
    other = record_of(request(str(style.with_name("other.safetensors"))))
    assert list(record["inputs"].values()) != list(other["inputs"].values())
    assert "lora" not in record_of(completed(Request(model="m", images="i", queries=({"prompt": "x"},))))


def test_an_adapter_that_does_not_fit_is_refused_before_images_are_read(
    world: UserWorld, style: Path, empty: Path
) -> None:
    other = save(style.with_name("xl.safetensors"), {"lora_te2_x.lora_down.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"^0 of 1 tensors of .*xl.safetensors fit this model.*SDXL"):
        main(["attribute", *world.words, *world.query, "--lora", str(other)])
    assert not (empty / "cache").exists()
    assert not (empty / "wherefrom-runs").exists()


def test_a_loaded_model_is_not_changed(world: UserWorld, style: Path, empty: Path) -> None:
    pipeline = load_pipeline(str(world.model))
    for model in (pipeline, load_model(str(world.model))):
        with pytest.raises(ValueError, match=r"^AttributionOptions.lora: the model is a loaded .*load_lora_weights"):
            attribute_images(model, world.images, ["a red square"], options=AttributionOptions(lora=[style]))
    result = attribute_images(
        world.model,
        world.images,
        [(world.generated, "a red square")],
        options=AttributionOptions(lora=[(style, 0.5)], store="cache", progress=False),
    )
    assert "with LoRA my style.safetensors at 0.5 (" in result._about["Model"]
