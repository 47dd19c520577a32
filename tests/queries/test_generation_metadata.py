"""What image files say of how they were made: real files of every form, and files that mean harm."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from wherefrom.queries.embedded_text import read_embedded_texts, user_comment
from wherefrom.queries.generation_metadata import GenerationMetadata, read_generation_metadata
from wherefrom.queries.infotext import parse_infotext, without_networks

INFOTEXT = """\
a red bus <lora:busStyle_v2:0.8> on a road,  <lyco:night:te=0.5:unet=1>rain
second line of it
Negative prompt: blurry, (bad:1.3)
more of it
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Lora hashes: "busStyle_v2: abcdef012345, night: 0123", \
Version: v1.9.4"""
PROMPT = "a red bus  on a road,  rain\nsecond line of it"


def image() -> Image.Image:
    return Image.new("RGB", (16, 8), (200, 30, 30))


def png(path: Path, *, international: bool = False, packed: bool = False, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        if international:
            info.add_itxt(key, text, zip=packed)
        else:
            info.add_text(key, text, zip=packed)
    image().save(path, pnginfo=info)
    return path


def with_exif(path: Path, value: bytes | str, tag: int = 0x9286, *, below: bool = True) -> Path:
    exif = Image.Exif()
    exif[0x0131] = "a program"  # Pillow writes no block without a tag at the top
    if below:
        exif.get_ifd(0x8769)[tag] = value
    else:
        exif[tag] = value
    image().save(path, exif=exif)
    return path


def check_infotext(found: GenerationMetadata | None, prompt: str = PROMPT) -> None:
    assert found is not None
    assert found.prompt == prompt
    assert found.negative == "blurry, (bad:1.3)\nmore of it"
    assert found.loras == (("busStyle_v2", 0.8), ("night", 0.5))
    assert found.model_hash == "6ce0161689"
    wanted = {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "CFG scale": "7",
        "Seed": "965400086",
        "Size": "512x768",
        "Model": "v1-5-pruned-emaonly",
        "Lora hashes": "busStyle_v2: abcdef012345, night: 0123",
        "Version": "v1.9.4",
    }
    assert {key: found.settings.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("international", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_web_uis_text_in_png(tmp_path: Path, international: bool, packed: bool) -> None:
    path = png(tmp_path / "q.png", international=international, packed=packed, parameters=INFOTEXT)
    found = read_generation_metadata(path)
    check_infotext(found)
    assert found is not None
    assert "AUTOMATIC1111" in found.source
    assert found.notes == ()
    with Image.open(path) as opened:
        check_infotext(read_generation_metadata(opened))


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
@pytest.mark.parametrize(
    "encoded",
    [
        b"UNICODE\x00" + INFOTEXT.encode("utf-16-be"),  # what the web UI writes
        b"UNICODE\x00" + INFOTEXT.encode("utf-16-le"),
        b"UNICODE\x00" + INFOTEXT.encode("utf-16"),  # with a mark of its order
        b"ASCII\x00\x00\x00" + INFOTEXT.encode(),
        bytes(8) + INFOTEXT.encode(),
    ],
    ids=["big", "little", "marked", "ascii", "undefined"],
)
def test_the_web_uis_text_in_exif(tmp_path: Path, ending: str, encoded: bytes) -> None:
    path = with_exif(tmp_path / f"q.{ending}", encoded)
    check_infotext(read_generation_metadata(path))
    with Image.open(path) as opened:
        check_infotext(read_generation_metadata(opened))


@pytest.mark.parametrize("order", ["be", "le"])
def test_letters_of_any_alphabet_in_the_blocks_own_byte_order(order: str) -> None:
    text = "赤いバス、雨、夜"
    assert user_comment(b"UNICODE\x00" + text.encode(f"utf-16-{order}"), order) == text
    assert user_comment(b"JIS\x00\x00\x00\x00\x00" + text.encode("iso2022_jp")) == text


@pytest.mark.parametrize("kind", ["tEXt in UTF-8", "latin-1", "iTXt"])
def test_accents_in_png(tmp_path: Path, kind: str) -> None:
    prompt = "un café à Orléans"
    path = tmp_path / "q.png"
    if kind == "tEXt in UTF-8":  # against the standard, and done
        info = PngImagePlugin.PngInfo()
        info.add(b"tEXt", b"parameters\x00" + prompt.encode())
        image().save(path, pnginfo=info)
    else:
        png(path, international=kind == "iTXt", parameters=prompt)
    found = read_generation_metadata(path)
    assert found is not None
    assert found.prompt == prompt


def test_a_prompt_without_settings_and_settings_without_a_prompt(tmp_path: Path) -> None:
    found = read_generation_metadata(png(tmp_path / "a.png", parameters="a fox, 3: the third"))
    assert found is not None
    assert (found.prompt, found.negative, found.settings) == ("a fox, 3: the third", None, {})
    settings = "Steps: 5, Sampler: Euler, Seed: 1"
    found = read_generation_metadata(png(tmp_path / "b.png", parameters=settings))
    assert found is not None
    assert (found.prompt, found.settings["Steps"]) == ("", "5")
    assert read_generation_metadata(png(tmp_path / "c.png")) is None
    assert read_generation_metadata(png(tmp_path / "d.png", Comment="made in GIMP")) is None
    assert read_generation_metadata(with_exif(tmp_path / "e.jpg", b"ASCII\x00\x00\x00holiday: 3, beach: 4")) is None


def test_attention_is_said_and_not_interpreted(tmp_path: Path) -> None:
    for number, prompt in enumerate(["a (red:1.2) bus", "a [red] bus", "a bus BREAK rain", "a ((bus))"]):
        found = read_generation_metadata(png(tmp_path / f"{number}.png", parameters=prompt))
        assert found is not None
        assert found.prompt == prompt
        assert "they are not interpreted here" in found.notes[0]
    found = read_generation_metadata(png(tmp_path / "plain.png", parameters=r"a bus \(red\), Breakfast"))
    assert found is not None
    assert found.notes == ()


def graph(**changes: Any) -> dict[str, Any]:
    """ComfyUI's default graph with a LoRA."""
    nodes: dict[str, Any] = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 156680208700286,
                "steps": 20,
                "cfg": 8,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1,
                "model": ["10", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
            "_meta": {"title": "KSampler"},
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15/v1-5.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red bus", "clip": ["10", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["10", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
        "10": {
            "class_type": "LoraLoader",
            "inputs": {
                "lora_name": "styles\\bus.safetensors",
                "strength_model": 0.7,
                "strength_clip": 1.0,
                "model": ["4", 0],
                "clip": ["4", 1],
            },
        },
    }
    for name, node in changes.items():
        nodes[name.removeprefix("n")] = node
    return nodes


def of_graph(path: Path, nodes: Any) -> GenerationMetadata:
    found = read_generation_metadata(png(path, prompt=json.dumps(nodes), workflow='{"nodes": [], "links": []}'))
    assert found is not None
    assert found.source.startswith("ComfyUI graph")
    return found


def encode(text: Any) -> dict[str, Any]:
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["4", 1]}}


def test_comfyuis_default_graph(tmp_path: Path) -> None:
    found = of_graph(tmp_path / "q.png", graph())
    assert (found.prompt, found.negative) == ("a red bus", "text, watermark")
    assert found.loras == (("styles\\bus.safetensors", 0.7),)
    assert found.notes == ()
    assert dict(found.settings) == {
        "Model": "sd15/v1-5.safetensors",
        "Steps": "20",
        "Sampler": "euler",
        "Schedule type": "normal",
        "CFG scale": "8",
        "Seed": "156680208700286",
        "Denoising strength": "1",
        "Size": "512x640",
    }
    webp = with_exif(tmp_path / "q.webp", f"prompt:{json.dumps(graph())}", 0x0110, below=False)
    again = read_generation_metadata(webp)
    assert again is not None
    assert again.prompt == "a red bus"


def test_comfyuis_texts_through_other_nodes(tmp_path: Path) -> None:
    sampler = graph()["3"]
    flux = graph(
        n3={
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"noise": ["11", 0], "guider": ["12", 0], "sampler": ["13", 0], "sigmas": ["14", 0]},
        },
        n11={"class_type": "RandomNoise", "inputs": {"noise_seed": 7}},
        n12={"class_type": "BasicGuider", "inputs": {"model": ["10", 0], "conditioning": ["15", 0]}},
        n13={"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        n14={"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 4, "model": ["10", 0]}},
        n15={"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    )
    found = of_graph(tmp_path / "flux.png", flux)
    assert (found.prompt, found.negative, found.settings["Seed"], found.settings["Steps"]) == (
        "a red bus",
        None,
        "7",
        "4",
    )
    linked = graph(n6=encode(["20", 0]), n20={"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a fox"}})
    assert of_graph(tmp_path / "linked.png", linked).prompt == "a fox"
    controlled = graph(
        n3={**sampler, "inputs": {**sampler["inputs"], "positive": ["21", 0], "negative": ["21", 1]}},
        n21={
            "class_type": "ControlNetApplyAdvanced",
            "inputs": {"strength": 1, "positive": ["6", 0], "negative": ["7", 0], "image": ["22", 0]},
        },
        n22={"class_type": "LoadImage", "inputs": {"image": "pose.png"}},
    )
    found = of_graph(tmp_path / "controlled.png", controlled)
    assert (found.prompt, found.negative) == ("a red bus", "text, watermark")
    two = {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_g": "a fox", "text_l": "a fox", "width": 1024}}
    assert of_graph(tmp_path / "sdxl.png", graph(n6=two)).prompt == "a fox"


def loop_of_reroutes() -> dict[str, Any]:
    sampler = graph()["3"]
    return graph(
        n3={**sampler, "inputs": {**sampler["inputs"], "positive": ["30", 0]}},
        n30={"class_type": "Reroute", "inputs": {"": ["31", 0]}},
        n31={"class_type": "Reroute", "inputs": {"": ["30", 0]}},
    )


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (graph(n40=graph()["3"]), "has 2 samplers"),
        (graph(n3={"class_type": "SeedVR2Sampler", "inputs": {}}), r"no sampler that is known here \(SeedVR2Sampler\)"),
        (graph(n6=encode(["20", 0]), n20={"class_type": "MagicPrompt", "inputs": {"text": "x"}}), "not known here"),
        (graph(n6={"class_type": "MyEncoder", "inputs": {"clip": ["4", 1]}}), "goes through MyEncoder"),
        (loop_of_reroutes(), "goes round in a circle"),
        (graph(n6=encode(["99", 0])), "not known here"),
        (
            graph(n6={"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_g": "a fox", "text_l": "a bus"}}),
            "several text encoders different positive texts",
        ),
        (
            graph(
                n6={
                    "class_type": "ConditioningCombine",
                    "inputs": {"conditioning_1": ["50", 0], "conditioning_2": ["51", 0]},
                },
                n50=encode("a fox"),
                n51=encode("a bus"),
            ),
            "joins 2 texts as positive",
        ),
    ],
)
def test_a_graph_that_is_not_certain_is_not_guessed(tmp_path: Path, nodes: dict[str, Any], said: str) -> None:
    found = of_graph(tmp_path / "q.png", nodes)
    assert found.prompt is None
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found.notes)


def test_a_workflow_without_its_graph_is_not_guessed(tmp_path: Path) -> None:
    found = read_generation_metadata(png(tmp_path / "q.png", workflow='{"nodes": [{"widgets_values": ["a bus"]}]}'))
    assert found is not None
    assert found.prompt is None
    assert "its prompt is not guessed" in found.notes[0]


JSON: dict[str, tuple[dict[str, str], str, str | None, dict[str, str], tuple[tuple[str, float | None], ...]]] = {
    "SwarmUI": (
        {
            "parameters": json.dumps(
                {
                    "sui_image_params": {
                        "prompt": "a red bus <lora:x:1>",
                        "negativeprompt": "blur",
                        "model": "OfficialStableDiffusion/sd_xl_base_1.0",
                        "seed": 305223794,
                        "steps": 25,
                        "cfgscale": 7.0,
                        "width": 1024,
                        "height": 768,
                        "loras": ["bus"],
                        "loraweights": ["0.5"],
                    },
                    "sui_extra_data": {"date": "2024-08-07"},
                }
            )
        },
        "a red bus",
        "blur",
        {"Seed": "305223794", "CFG scale": "7.0", "Size": "1024x768"},
        (("bus", 0.5), ("x", 1.0)),
    ),
    "Fooocus": (
        {
            "fooocus_scheme": "fooocus",
            "parameters": json.dumps(
                {
                    "prompt": "a red bus",
                    "full_prompt": ["a red bus, cinematic"],
                    "negative_prompt": "blur",
                    "base_model": "juggernautXL_v8",
                    "base_model_hash": "aeb7e9e689",
                    "loras": [["sd_xl_offset", 0.1, "4852686128"]],
                    "resolution": "(1152, 896)",
                    "seed": "1",
                    "version": "Fooocus v2.5.0",
                }
            ),
        },
        "a red bus",
        "blur",
        {"Model": "juggernautXL_v8", "Model hash": "aeb7e9e689", "Size": "(1152, 896)"},
        (("sd_xl_offset", 0.1),),
    ),
    "InvokeAI": (
        {
            "invokeai_metadata": json.dumps(
                {
                    "positive_prompt": "a red bus",
                    "negative_prompt": "blur",
                    "seed": 5,
                    "steps": 30,
                    "cfg_scale": 7.5,
                    "width": 512,
                    "height": 512,
                    "model": {"name": "sd-1.5", "hash": "blake3:aa", "base": "sd-1"},
                    "loras": [{"model": {"name": "bus"}, "weight": 0.75}],
                }
            )
        },
        "a red bus",
        "blur",
        {"Model": "sd-1.5", "Model hash": "blake3:aa", "Steps": "30"},
        (("bus", 0.75),),
    ),
    "InvokeAI, sd-metadata": (
        {
            "sd-metadata": json.dumps(
                {"model_weights": "sd-1.5", "image": {"prompt": [{"prompt": "a red bus", "weight": 1}], "seed": 3}}
            )
        },
        "a red bus",
        None,
        {"Model": "sd-1.5", "Seed": "3"},
        (),
    ),
    "InvokeAI, Dream": (
        {"Dream": '"a red bus" -s 50 -S 1234 -W 512 -H 512 -C 7.5 -A k_lms'},
        "a red bus",
        None,
        {"Steps": "50", "Seed": "1234", "CFG scale": "7.5", "Sampler": "k_lms"},
        (),
    ),
    "NovelAI": (
        {
            "Software": "NovelAI",
            "Description": "a red bus",
            "Comment": json.dumps(
                {"prompt": "a red bus", "uc": "blur", "steps": 28, "scale": 11, "seed": 9, "sampler": "k_euler"}
            ),
        },
        "a red bus",
        "blur",
        {"Steps": "28", "CFG scale": "11", "Sampler": "k_euler"},
        (),
    ),
    "diffusers' arguments": (
        {
            "metadata": json.dumps(
                {"prompt": "a red bus", "negative_prompt": "blur", "num_inference_steps": 28, "guidance_scale": 5}
            )
        },
        "a red bus",
        "blur",
        {"Steps": "28", "CFG scale": "5"},
        (),
    ),
    "texts by name": ({"prompt": "a red bus", "seed": "4"}, "a red bus", None, {"Seed": "4"}, ()),
}


@pytest.mark.parametrize("program", JSON)
def test_other_programs(tmp_path: Path, program: str) -> None:
    texts, prompt, negative, settings, loras = JSON[program]
    found = read_generation_metadata(png(tmp_path / "q.png", **texts))
    assert found is not None
    assert (found.prompt, found.negative, found.loras) == (prompt, negative, loras)
    assert {name: found.settings.get(name) for name in settings} == settings
    if program == "Fooocus":
        assert "its styles" in found.notes[0]
    again = GenerationMetadata.from_json(json.loads(json.dumps(found.as_json())))
    assert again == found


def test_swarmui_and_others_in_exif_and_draw_things_in_xmp(tmp_path: Path) -> None:
    texts, prompt, *_ = JSON["SwarmUI"]
    found = read_generation_metadata(
        with_exif(tmp_path / "q.jpg", b"UNICODE\x00" + texts["parameters"].encode("utf-16-be"))
    )
    assert found is not None
    assert found.prompt == prompt
    found = read_generation_metadata(with_exif(tmp_path / "f.jpg", JSON["Fooocus"][0]["parameters"], below=False))
    assert found is not None
    assert (found.prompt, found.source[:7]) == ("a red bus", "Fooocus")
    told = json.dumps({"c": "a red bus", "uc": "blur", "seed": 3, "lora": [{"model": "bus.ckpt", "weight": 0.5}]})
    xmp = (
        '<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'xmlns:exif="http://ns.adobe.com/exif/1.0/"><exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">'
        f"{told.replace('&', '&amp;')}</rdf:li></rdf:Alt></exif:UserComment></rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="w"?>'
    )
    found = read_generation_metadata(png(tmp_path / "x.png", international=True, **{"XML:com.adobe.xmp": xmp}))
    assert found is not None
    assert (found.prompt, found.negative, found.loras) == ("a red bus", "blur", (("bus.ckpt", 0.5),))
    image().save(tmp_path / "x.webp", xmp=xmp.encode())
    found = read_generation_metadata(tmp_path / "x.webp")
    assert found is not None
    assert found.prompt == "a red bus"
    bomb = xmp.replace("<x:xmpmeta", '<!DOCTYPE x [<!ENTITY a "b">]><x:xmpmeta')
    assert read_generation_metadata(png(tmp_path / "b.png", international=True, **{"XML:com.adobe.xmp": bomb})) is None


def test_two_programs_that_agree_are_one_and_that_differ_are_not_guessed(tmp_path: Path) -> None:
    settings = "Steps: 20, Sampler: euler, Seed: 1, Model hash: 6ce0161689"
    both = png(tmp_path / "q.png", parameters=f"a red bus\n{settings}", prompt=json.dumps(graph()))
    found = read_generation_metadata(both)
    assert found is not None
    assert (found.prompt, found.settings["Size"], found.model_hash) == ("a red bus", "512x640", "6ce0161689")
    assert found.loras == (("styles\\bus.safetensors", 0.7),)
    differ = png(tmp_path / "d.png", parameters=f"a fox\n{settings}", prompt=json.dumps(graph()))
    found = read_generation_metadata(differ)
    assert found is not None
    assert found.prompt is None
    assert "it states different prompts" in found.notes[-1]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(path: Path, *chunks: bytes) -> Path:
    plain = png(path).read_bytes()
    path.write_bytes(plain[:33] + b"".join(chunks) + plain[33:])  # after IHDR
    return path


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_a_text_that_unpacks_to_much_is_not_unpacked(tmp_path: Path, kind: str) -> None:
    packed = zlib.compress(b"a" * (64 << 20), 9)  # 64 KiB
    head = b"parameters\x00\x00" if kind == "zTXt" else b"parameters\x00\x01\x00\x00\x00"
    path = with_chunk(tmp_path / "q.png", chunk(kind.encode(), head + packed))
    found = read_generation_metadata(path)
    assert found is not None
    assert found.prompt is None
    assert "longer than 4 MiB" in found.notes[0]


def test_files_that_mean_harm_or_are_damaged_say_nothing_and_raise_nothing(tmp_path: Path) -> None:
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    for number, text in enumerate(
        [deep, '{"prompt": ' + "[" * 50_000, "Steps: " * 20_000, 'a:"\\' * 20_000, "<" * 50_000]
    ):
        found = read_generation_metadata(png(tmp_path / f"{number}.png", parameters=text))
        assert found is None or found.prompt is None or found.prompt == text.strip() or not text.startswith("{")
    whole = png(tmp_path / "whole.png", parameters=INFOTEXT).read_bytes()
    jpeg = with_exif(tmp_path / "whole.jpg", b"UNICODE\x00" + INFOTEXT.encode("utf-16-be")).read_bytes()
    webp = with_exif(tmp_path / "whole.webp", b"UNICODE\x00" + INFOTEXT.encode("utf-16-be")).read_bytes()
    for name, content in (("c.png", whole), ("c.jpg", jpeg), ("c.webp", webp)):
        for end in range(0, min(len(content), 900), 37):
            (tmp_path / name).write_bytes(content[:end])
            read_generation_metadata(tmp_path / name)
        for place in range(12, min(len(content), 900), 23):
            (tmp_path / name).write_bytes(content[:place] + b"\xff\xfe\xff" + content[place + 3 :])
            read_generation_metadata(tmp_path / name)
    many = [chunk(b"tEXt", b"k%d\x00v" % index) for index in range(500)]
    texts, notes = read_embedded_texts(with_chunk(tmp_path / "many.png", *many))
    assert len(texts) == 64
    assert "more than 64 texts" in notes[0]
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    assert read_generation_metadata(tmp_path / "x.gif") is None


def test_a_text_in_the_first_lines_is_no_setting() -> None:
    text = 'Steps: 1, Seed: 2, Size: 3\nthe "Negative prompt:" of it'
    assert parse_infotext(text) == (text, None, {})
    assert without_networks("<b>bold</b> <lora:a:high> <hypernet:b:1> <lora:c>") == (
        "<b>bold</b>",
        [("a", None), ("c", None)],
    )


def test_the_table_and_the_record_are_short(tmp_path: Path) -> None:
    settings = ", ".join(f"Key {index}: {'v' * 1000}" for index in range(40))
    found = read_generation_metadata(png(tmp_path / "q.png", parameters=f"{'p ' * 5000}\nSteps: 1, {settings}"))
    assert found is not None
    assert max(len(value) for value in found.table().values()) <= 2000
    assert len(found.prompt or "") == 9999
    assert max(len(value) for value in found.as_json()["settings"].values()) <= 400
