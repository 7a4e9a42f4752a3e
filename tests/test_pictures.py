"""Pictures may be given as people have them; the model reads the tiles that the image processor of its folder cuts."""

import numpy as np
import pytest
import torch
from conversations import picture
from tiny_models import tiny_config

from mmmamba.image_processing_mmmamba import MmMambaImageProcessor, MmMambaImageProcessorPil
from mmmamba.pictures_mmmamba import as_tiles, image_processor
from mmmamba.tokenization_mmmamba import MmMambaTokenizer


CONFIG = tiny_config("hybrid")
WIDE, SMALL = picture(48, 16), picture(16, 16)  # four tiles, a thumbnail among them, and one
CUT = MmMambaImageProcessor(size={"height": 16, "width": 16})


def tiles(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def cut(*pictures):
    return CUT(images=list(pictures), return_tensors="pt")["pixel_values"]


def assert_tiles(pixel_values, expected, counts, given=None):
    found, found_counts = as_tiles(pixel_values, given, CONFIG)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found_counts == counts


def test_tiles_are_taken_as_tensor_array_or_list():
    five = tiles(5)
    assert as_tiles(five, None, CONFIG)[0] is five
    for given in (five, five.numpy(), list(five), [*five.numpy()], tuple(five)):
        assert_tiles(given, five, None)
        assert_tiles(given, five, [2, 3], given=[2, 3])
    assert_tiles([five[:2], five[2:].numpy()], five, [2, 3])
    assert_tiles([five[:4].half(), five[4:]], torch.cat([five[:4].half(), five[4:].half()]), [4, 1])
    for nothing in (None, []):
        assert as_tiles(nothing, None, CONFIG) == (None, None)


def test_pictures_are_cut_and_counted():
    levels = np.asarray(WIDE)
    for given in (WIDE, levels, levels.transpose(2, 0, 1), torch.tensor(levels), [WIDE]):
        assert_tiles(given, cut(WIDE), [4])
    assert_tiles([WIDE, SMALL], cut(WIDE, SMALL), [4, 1])
    assert_tiles([SMALL, tiles(2), WIDE], torch.cat([cut(SMALL), tiles(2), cut(WIDE)]), [1, 2, 4])
    assert_tiles([WIDE, SMALL], cut(WIDE, SMALL), [4, 1], given=[4, 1])


@pytest.mark.parametrize(
    ("pixel_values", "given", "words"),
    [
        ([WIDE, SMALL], [1, 4], ["[1, 4]", "[4, 1]", "leave num_patches_list out"]),
        ([WIDE, tiles(1)[0]], None, ["mixes pictures and single tiles"]),
        ([tiles(2), tiles(2)[..., :8]], None, ["(3, 16, 16)", "(3, 16, 8)", "one size"]),
        (tiles(1)[0], None, ["(3, 16, 16)", "as a list"]),
        (np.full((16, 48, 3), -1.0), None, ["float64", "(16, 48, 3)", "integers a picture's levels"]),
        (torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8), None, ["uint8", "several as a list"]),
        (torch.zeros(3, 16, 16, dtype=torch.bool), None, ["bool"]),
        ("photo.jpg", None, ["str ('photo.jpg')", "PIL.Image.open"]),
        ({"pixel_values": tiles(1)}, None, ["dict", "inputs['pixel_values']"]),
        ([SMALL, None], None, ["NoneType"]),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(pixel_values, given, words):
    with pytest.raises(ValueError) as error:
        as_tiles(pixel_values, given, CONFIG)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_folder_of_the_tokenizer_then_of_the_model_says_how_to_cut(tmp_path):
    tokenizer, config = MmMambaTokenizer.__new__(MmMambaTokenizer), tiny_config("hybrid")
    tokenizer.name_or_path = str(tmp_path / "tokenizer")
    config.name_or_path = str(tmp_path / "model")
    side = {"height": 16, "width": 16}
    assert image_processor(config, tokenizer).max_patches == 12
    assert dict(image_processor(config, tokenizer).size) == side
    for folder, max_patches in (("model", 3), ("tokenizer", 2)):
        MmMambaImageProcessorPil(size=side, max_patches=max_patches).save_pretrained(tmp_path / folder)
        assert image_processor(config, tokenizer).max_patches == max_patches
    assert image_processor(config).max_patches == 3
    assert as_tiles(WIDE, None, config, tokenizer)[1] == [3]  # two tiles and the thumbnail
    (tmp_path / "tokenizer" / "preprocessor_config.json").write_text("{")
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):  # a broken folder is not passed over
        image_processor(config, tokenizer)


def test_arrays_of_several_pictures_and_pictures_of_levels_up_to_one_are_cut():
    frames = np.stack([np.asarray(WIDE), np.asarray(WIDE)[:, ::-1]])
    assert_tiles(frames, cut(*frames), [4, 4])
    assert_tiles(np.asarray(WIDE) / 255, cut(WIDE), [4])
