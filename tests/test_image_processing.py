"""Tiles equal upstream's; files, modes and sizes of every kind are read or refused in one sentence."""

import base64
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from mmmamba.image_processing_mmmamba import (
    MmMambaImageProcessor,
    MmMambaImageProcessorPil,
    choose_grid,
    grids,
)
from mmmamba.image_reading_mmmamba import to_rgb


ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "tiling"
META = json.loads((GOLDEN / "meta.json").read_text())
GRID_ROWS = json.loads((GOLDEN / "grid_table.json").read_text())["rows"]
TILES = load_file(GOLDEN / "tiles.safetensors")
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SIDE = META["input_size"]

pil = MmMambaImageProcessorPil(size={"height": SIDE, "width": SIDE})
torchvision = MmMambaImageProcessor(size={"height": SIDE, "width": SIDE})
both = pytest.mark.parametrize("processor", [pil, torchvision], ids=["pil", "torchvision"])


def max_level_difference(tiles, others):
    """Largest difference in levels of 0 to 255."""
    return ((tiles - others) * STD * 255).abs().max().item()


def picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(("max_tiles", "order"), META["candidate_order_by_max_num"].items())
def test_candidate_grids_have_upstreams_order(max_tiles, order):
    assert [list(grid) for grid in grids(1, int(max_tiles))] == order


def test_the_chosen_grid_is_upstreams_for_every_size():
    chosen = [[w, h, max_tiles, *choose_grid(w, h, 448, 1, max_tiles)] for w, h, max_tiles, _, _ in GRID_ROWS]
    assert chosen == GRID_ROWS


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: f"{case['image']}-{case['max_num']}")
def test_pillow_tiles_equal_upstreams_and_torchvision_differs_by_three_levels_at_most(case):
    image = META["images"][case["image"]]
    with Image.open(GOLDEN / image["file"]) as opened:
        assert zlib.crc32(np.asarray(to_rgb(opened)).tobytes()) == image["rgb_crc32"]
        options = {"max_patches": case["max_num"], "return_tensors": "pt"}
        inputs = pil(opened, **options)
        from_torchvision = torchvision(opened, **options)
    tiles = inputs["pixel_values"]
    assert tiles.shape == (case["num_tiles"], 3, SIDE, SIDE)
    assert tiles.dtype == torch.float32
    assert inputs["num_patches"].tolist() == [case["num_tiles"]]
    width, height = image["size"]
    assert pil.get_number_of_image_patches(height, width, {"max_patches": case["max_num"]}) == case["num_tiles"]

    # The fixture rounds to six decimals.
    flat = tiles.flatten(1)
    for got, name in (
        (tiles.mean((1, 2, 3)), "tile_mean"),
        (tiles.mean((2, 3)), "tile_channel_mean"),
        (flat[:, :8], "tile_first8"),
        (flat[:, -4:], "tile_last4"),
    ):
        torch.testing.assert_close(got, torch.tensor(case[name]), atol=2e-6, rtol=0)
    truth = TILES.get(f"{case['image']}__max{case['max_num']}")
    if truth is not None:
        torch.testing.assert_close(tiles, truth, atol=1e-6, rtol=0)
    assert max_level_difference(from_torchvision["pixel_values"], tiles) <= 3.01
    assert from_torchvision["num_patches"].tolist() == [case["num_tiles"]]


@both
def test_tiles_of_several_pictures_keep_the_order_of_the_pictures(processor):
    pictures = [picture(60, 20), picture(30, 30), picture(20, 80)]
    inputs = processor(pictures, max_patches=6, return_tensors="pt")
    alone = [processor(p, max_patches=6, return_tensors="pt")["pixel_values"] for p in pictures]
    assert inputs["num_patches"].tolist() == [len(tiles) for tiles in alone] == [4, 1, 5]
    assert inputs["num_patches"].dtype == torch.int64
    torch.testing.assert_close(inputs["pixel_values"], torch.cat(alone))


@both
@pytest.mark.parametrize(("width", "height", "tiles"), [(1, 1, 1), (20000, 3, 13), (3, 20000, 13), (2, 1, 3)])
def test_pictures_of_extreme_aspect_ratio_have_tiles(processor, width, height, tiles):
    inputs = processor(picture(width, height), return_tensors="pt")
    assert inputs["pixel_values"].shape == (tiles, 3, SIDE, SIDE)
    assert inputs["pixel_values"].isfinite().all()


@both
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_every_pillow_mode_is_converted_to_rgb(processor, mode):
    inputs = processor(picture(SIDE, SIDE, mode), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)


@both
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "object"])
@pytest.mark.parametrize("brightest", [200, 65535])
def test_sixteen_bits_are_scaled_not_clipped(processor, as_file, brightest, tmp_path):
    deep = np.linspace(0, brightest, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = str(tmp_path / "deep.png") if as_file else Image.open(tmp_path / "deep.png")
    shallow = Image.fromarray((deep / 257).round().astype(np.uint8)).convert("RGB")
    torch.testing.assert_close(
        processor(image, return_tensors="pt")["pixel_values"], processor(shallow, return_tensors="pt")["pixel_values"]
    )


@both
def test_of_an_animation_the_first_frame_is_used(processor, tmp_path):
    first, second = picture(SIDE, SIDE).quantize(64), picture(SIDE, SIDE - 1).resize((SIDE, SIDE)).quantize(64)
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    torch.testing.assert_close(
        processor(str(tmp_path / "moving.gif"), return_tensors="pt")["pixel_values"],
        processor(first.convert("RGB"), return_tensors="pt")["pixel_values"],
    )


@both
def test_a_picture_may_be_a_path_base64_an_array_or_a_tensor(processor, tmp_path):
    image = picture(SIDE, SIDE)
    image.save(tmp_path / "picture.png")
    truth = processor(image, return_tensors="pt")["pixel_values"]
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    array = np.array(image)
    for form in (tmp_path / "picture.png", str(tmp_path / "picture.png"), data, array, torch.tensor(array)):
        torch.testing.assert_close(processor(form, return_tensors="pt")["pixel_values"], truth)


@both
def test_a_missing_or_damaged_file_is_named_in_one_sentence(processor, tmp_path):
    for kind in ("png", "jpg"):
        picture(300, 300).save(tmp_path / f"whole.{kind}")
        (tmp_path / f"cut.{kind}").write_bytes((tmp_path / f"whole.{kind}").read_bytes()[:2000])
    (tmp_path / "words.png").write_text("not a picture")
    bad = {
        "none.png": "no file that exists",
        "cut.png": "truncated",
        "cut.jpg": "truncated",
        "words.png": "none that Pillow knows",
    }
    for name, reason in bad.items():
        with pytest.raises(ValueError, match=f"{name} cannot be opened as a picture .*{reason}") as error:
            processor(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"cut\.png cannot be opened as a picture .*give a whole, undamaged image file"
    ):
        processor(Image.open(tmp_path / "cut.png"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_patches": 0}, "min_patches=1 and max_patches=0 allow no grid"),
        ({"min_patches": 7, "max_patches": 6}, "min_patches=7 and max_patches=6 allow no grid"),
        ({"size": {"height": 32, "width": 48}}, "size 32 x 48 is no square"),
    ],
)
@both
def test_contradicting_options_are_refused(processor, options, words):
    with pytest.raises(ValueError, match=words):
        processor(picture(40, 40), **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_patches": 6}, {"use_thumbnail": False}, {"size": 28}, {"min_patches": 4}, {"crop_to_patches": False}],
    ids=lambda options: "-".join(options) or "default",
)
def test_the_number_of_tiles_is_computed_from_the_size_alone(options):
    for width, height in ((100, 100), (300, 90), (56, 170)):
        counted = torchvision(picture(width, height), **options)["num_patches"]
        assert counted == [torchvision.get_number_of_image_patches(height, width, options)]


def test_without_thumbnail_only_the_grid_is_returned():
    inputs = pil(picture(120, 60), use_thumbnail=False, max_patches=2, return_tensors="pt")
    with_thumbnail = pil(picture(120, 60), max_patches=2, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], with_thumbnail["pixel_values"][:-1])


@both
def test_a_picture_that_is_not_cropped_to_patches_is_one_tile(processor):
    wide = picture(120, 60)
    tiles = processor(wide, return_tensors="pt")["pixel_values"]
    assert len(tiles) == 3
    assert torch.equal(processor(wide, crop_to_patches=True, return_tensors="pt")["pixel_values"], tiles)
    whole = processor(wide, crop_to_patches=False, return_tensors="pt")
    assert whole["num_patches"].tolist() == [1] and torch.equal(whole["pixel_values"], tiles[-1:])  # the thumbnail


def test_a_saved_torchvision_processor_can_be_loaded_as_either_backend(tmp_path):
    MmMambaImageProcessor(size={"height": 14, "width": 14}).save_pretrained(tmp_path)
    for backend in ("pil", "torchvision"):
        assert AutoImageProcessor.from_pretrained(tmp_path, backend=backend, trust_remote_code=True).backend == backend


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_the_released_folder_loads_with_either_backend(backend, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(ROOT / name, tmp_path)
    for module in ("configuration", "image_processing", "image_reading"):
        shutil.copy(ROOT / f"{module}_mmmamba.py", tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend, trust_remote_code=True)
    assert loaded.backend == backend
    assert (dict(loaded.size), loaded.max_patches) == ({"height": 448, "width": 448}, 12)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoImageProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.backend == backend
    image = picture(50, 20)
    torch.testing.assert_close(again(image, size=28)["pixel_values"], loaded(image, size=28)["pixel_values"])
