"""Pictures from everywhere are read alike, upright and in RGB, or refused in one sentence that names them."""

import base64
import os
import signal
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conversations import processor_with, turns
from PIL import Image, ImageOps
from source_distributions import unpacked

from mmmamba.cli import chat
from mmmamba.conversion.convert import chat_template
from mmmamba.conversion.distillation.data import BadRow, ConversationEncoder
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor, MmMambaImageProcessorPil
from mmmamba.image_reading_mmmamba import read_image, to_rgb


SIDE = 16
pil = MmMambaImageProcessorPil(size={"height": SIDE, "width": SIDE})
torchvision = MmMambaImageProcessor(size={"height": SIDE, "width": SIDE})
both = pytest.mark.parametrize("processor", [pil, torchvision], ids=["pil", "torchvision"])


def levels(processor, image, **options):
    """The only tile in levels of 0 to 255, (side, side, 3)."""
    inputs = processor(image, do_rescale=False, do_normalize=False, return_tensors="np", max_patches=1, **options)
    return inputs["pixel_values"][0].transpose(1, 2, 0)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- what a picture may look like ------------------------------------------------------------------------------------


def transparent(kind, folder):
    """A file whose upper half is transparent in the mode and with the kind of transparency asked for."""
    picture = Image.fromarray(noise(SIDE, SIDE, 3))
    file = folder / f"picture.{'gif' if kind == 'gif' else 'png'}"
    if kind in ("png", "gif"):
        picture = Image.new("P", (SIDE, SIDE), 1)
        picture.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
        picture.paste(0, (0, 0, SIDE, SIDE // 2))
        picture.save(file, transparency=0)
    elif kind == "alphas of a palette":
        picture.quantize(8).save(file, transparency=bytes([0, 50, 100, 255, 0, 3, 4, 5]))
    elif kind in ("RGB", "L"):
        picture = picture.convert(kind)
        picture.save(file, transparency=picture.getpixel((0, 0)))
    else:
        picture.putalpha(Image.fromarray(noise(SIDE, SIDE, seed=1)))
        picture.convert(kind).save(file)
    return file


@both
@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", ["png", "gif", "alphas of a palette", "RGB", "L", "RGBA", "LA"])
def test_transparent_pixels_keep_their_colour_as_in_the_published_preprocessing(processor, kind, tmp_path):
    file = transparent(kind, tmp_path)
    published = np.asarray(Image.open(file).convert("RGB"))
    for image in (Image.open(file), str(file), read_image(file), Image.open(file).convert("RGB")):
        np.testing.assert_array_equal(levels(processor, image), published)


LAYOUTS = {
    "grey": lambda rgb: rgb[..., 0],
    "grey, first": lambda rgb: rgb[..., 0][None],
    "grey, last": lambda rgb: rgb[..., :1],
    "grey and alpha, first": lambda rgb: rgb[..., :2].transpose(2, 0, 1),
    "grey and alpha, last": lambda rgb: rgb[..., :2],
    "RGB, first": lambda rgb: rgb.transpose(2, 0, 1),
    "RGB, last": lambda rgb: rgb,
    "RGBA, first": lambda rgb: np.concatenate([rgb, rgb[..., :1]], -1).transpose(2, 0, 1),
    "RGBA, last": lambda rgb: np.concatenate([rgb, rgb[..., :1]], -1),
    "turned, not contiguous": lambda rgb: np.ascontiguousarray(rgb[::-1])[::-1],
}
VALUES = {
    "uint8": lambda x: x,
    "int64": lambda x: x.astype(np.int64),
    "floats to 255": lambda x: x.astype(np.float64),
    "floats to 1": lambda x: x.astype(np.float32) / 255,
    "halves to 1": lambda x: (x / 255).astype(np.float16),
    "uint16": lambda x: x.astype(np.uint16) * 257,
    "int32 of 16 bits": lambda x: x.astype(np.int32) * 257,
    "big-endian uint16": lambda x: (x.astype(np.uint16) * 257).astype(">u2"),
}


@both
@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_any_layout_are_read(processor, layout, as_tensor):
    rgb = noise(SIDE, SIDE, 3)
    array = LAYOUTS[layout](rgb)
    truth = rgb[..., :1].repeat(3, -1) if layout.startswith("grey") else rgb
    for image in (array, [array], [Image.fromarray(rgb), array]):
        if as_tensor:
            image = torch.tensor(array.copy())
        inputs = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        np.testing.assert_array_equal(inputs["pixel_values"][-1].transpose(1, 2, 0), truth)


@both
@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("values", VALUES)
def test_arrays_of_any_dtype_are_the_same_picture(processor, values, as_tensor):
    rgb = noise(SIDE + 5, SIDE + 3, 3)
    array = VALUES[values](rgb)
    image = torch.tensor(array.astype(array.dtype.newbyteorder("="))) if as_tensor else array
    truth = processor(Image.fromarray(rgb), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"], truth, atol=0, rtol=0)


@both
def test_floats_to_one_stay_as_they_are_where_nothing_is_rescaled(processor):
    rgb = noise(SIDE, SIDE, 3)
    np.testing.assert_allclose(levels(processor, rgb / np.float32(255)), rgb / 255, atol=1 / 255)
    assert levels(processor, rgb / np.float32(255)).max() <= 1


@both
def test_a_boolean_array_is_black_and_white(processor):
    mask = noise(SIDE, SIDE) > 127
    truth = processor(Image.fromarray(mask).convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(mask, return_tensors="pt")["pixel_values"], truth)


@both
def test_a_picture_of_few_rows_has_its_channels_where_three_are(processor):
    rgb = noise(2, 9, 3)
    truth = processor(Image.fromarray(rgb), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(rgb, return_tensors="pt")["pixel_values"], truth)
    first = rgb.transpose(2, 0, 1)
    torch.testing.assert_close(processor(first, return_tensors="pt")["pixel_values"], truth)
    ambiguous = noise(3, 5, 3)
    said = processor(ambiguous, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    torch.testing.assert_close(said, processor(Image.fromarray(ambiguous), return_tensors="pt")["pixel_values"])


def float_tiff(values, file):
    Image.fromarray(values.astype(np.float32)).save(file)
    return file


def test_floats_of_a_file_may_be_shares_levels_or_sixteen_bits(tmp_path):
    grey = noise(SIDE, SIDE)
    truth = np.asarray(Image.fromarray(grey).convert("RGB"))
    for scale in (1 / 255, 1, 257):
        file = float_tiff(grey * np.float32(scale), tmp_path / "a.tif")
        np.testing.assert_array_equal(np.asarray(read_image(file)), truth)
    values = grey.astype(np.float32)
    values[0, 0] = np.nan
    assert np.asarray(read_image(float_tiff(values, tmp_path / "a.tif")))[0, 0].tolist() == [0, 0, 0]


# --- upright by every path -------------------------------------------------------------------------------------------


class Files(BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path[1:] in self.server.contents
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.server.contents.get(self.path[1:], b"nothing here"))

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Files)
    server.contents, server.address = {}, f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright_by_every_path(orientation, server, tmp_path):
    """The truth is `ImageOps.exif_transpose`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    Image.fromarray(noise(12, 20, 3)).save(file, exif=exif)
    with Image.open(file) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    content = file.read_bytes()
    server.contents["photo.png"] = content
    text = base64.b64encode(content).decode()
    ways = {
        "path": read_image(file),
        "address": read_image(f"{server.address}/photo.png"),
        "base64": read_image(text),
        "data": read_image(f"data:image/png;base64,{text}"),
        "bytes": read_image(content),
        "opened": to_rgb(Image.open(file)),
        "opened and converted": to_rgb(Image.open(file).convert("RGB")),
        "read twice": to_rgb(read_image(file)),
        "command line": chat.read_image(file),
    }
    for way, image in ways.items():
        np.testing.assert_array_equal(np.asarray(image), upright, err_msg=way)
    truth = pil(Image.fromarray(upright), return_tensors="pt")["pixel_values"]
    for image in (file, str(file), f"{server.address}/photo.png", text, Image.open(file), chat.read_image(file)):
        torch.testing.assert_close(pil(image, return_tensors="pt")["pixel_values"], truth)
    encoder = ConversationEncoder(processor_with(chat_template("internlm2-chat")))
    truth = encoder({"image": Image.fromarray(upright), "conversations": turns("a", "b")})["pixel_values"]
    for image in ("photo.png", {"bytes": content}, Image.open(file)):
        row = encoder({"image": image, "conversations": turns("a", "b")}, tmp_path)
        torch.testing.assert_close(row["pixel_values"], truth)


def test_a_damaged_orientation_is_none(tmp_path):
    rgb = noise(12, 20, 3)
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00*broken")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), rgb)


def test_reading_changes_nothing_in_the_picture_it_was_given(tmp_path):
    picture = Image.open(transparent("png", tmp_path))
    pil(picture)
    assert picture.mode == "P" and picture.info["transparency"] == 0


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(read, *arguments, **options):
    """The one sentence with which something is refused."""
    with pytest.raises(ValueError) as error:
        read(*arguments, **options)
    message = str(error.value)
    assert type(error.value) in (ValueError, BadRow) and message and "\n" not in message and "0x7" not in message
    return message


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb():
    """A small PNG that says it has 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


DAMAGED = {
    "bomb.png": bomb,
    "words.png": lambda: b"not a picture",
    "empty.png": lambda: b"",
    "header.dds": lambda: b"DDS " + struct.pack("<I", 124) + bytes(120),
    "cut.avif": lambda: b"\x00\x00\x00\x20ftypavif" + bytes(40),
    "cut.webp": lambda: b"RIFF\x24\x00\x00\x00WEBPVP8 " + bytes(8),
    "cut.tif": lambda: b"II*\x00\x08\x00\x00\x00\xff\xff",
    "size.bmp": lambda: b"BM" + bytes(12) + struct.pack("<I", 40) + bytes(36),
    "nothing.ico": lambda: b"\x00\x00\x01\x00\xff\x00" + bytes(30),
    "nothing.png": lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)),
}


def readers(folder):
    """Everything that reads a picture's file, as functions of its path."""
    encoder = ConversationEncoder(processor_with(chat_template("internlm2-chat")))
    return {
        "command line": lambda file: chat.read_image(Path(file)),
        "pil": lambda file: pil(str(file)),
        "torchvision": lambda file: torchvision(str(file)),
        "data": lambda file: encoder({"image": str(file), "conversations": turns("a", "b")}, folder),
    }


@pytest.mark.parametrize("name", DAMAGED)
def test_whatever_a_decoder_raises_is_one_sentence_with_the_files_name(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(DAMAGED[name]())
    for way, read in readers(tmp_path).items():
        assert name in refused(read, file), way


@pytest.mark.parametrize(
    "error", [SyntaxError, NotImplementedError, RuntimeError, struct.error, KeyError, MemoryError]
)
def test_errors_of_every_kind_are_taken_from_a_decoder(error, tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    Image.fromarray(noise(4, 4, 3)).save(file)

    def load(self):
        raise error

    opened = Image.open(file)
    monkeypatch.setattr(type(opened), "load", load)
    assert f"a.png cannot be opened as a picture ({error.__name__})" in refused(read_image, file)
    assert "a.png cannot be opened as a picture" in refused(pil, opened)


def test_pipes_folders_and_devices_do_not_hang(tmp_path):
    signal.alarm(60)  # ends the process
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    for way, read in readers(tmp_path).items():
        for name in ("pipe.png", "folder.png", "link.png", "gone.png"):
            assert name in refused(read, tmp_path / name), way
    signal.alarm(0)


@both
def test_what_is_no_picture_is_refused_in_one_sentence(processor):
    nan = np.full((4, 4, 3), np.nan)
    bytes_as_base64 = "data:image/png;base64," + "A" * 400
    for image, words in (
        (Image.new("RGB", (0, 9)), "no pixels but 0 x 9"),
        (Image.new("L", (3, 0)), "no pixels but 3 x 0"),
        (np.zeros((0, 9, 3), "uint8"), r"shape (0, 9, 3) is no picture"),
        (torch.zeros(3, 0, 9), "shape (3, 0, 9) is no picture"),
        (np.zeros((5, 5, 7), "uint8"), "shape (5, 5, 7) is no picture"),
        (np.zeros(5, "uint8"), "shape (5,) is no picture"),
        (np.zeros((2, 2, 2, 4, 3), "uint8"), "shape (2, 2, 2, 4, 3) is no picture"),
        (nan, "values from nan to nan"),
        (np.full((4, 4), np.inf), "to inf"),
        ((noise(4, 4, 3) / 255 - 0.485) / 0.229, "before any normalisation"),
        (np.full((4, 4), -300), "values from -300"),
        (np.array([["a", "b"]]), "An array of <U1 is no picture"),
        (np.zeros((4, 4), complex), "An array of complex128"),
        (np.array([[None]]), "An array of object"),
        (torch.zeros(4, 4, dtype=torch.complex64), "A tensor of torch.complex64"),
        (None, "None is no picture"),
        ([None], "None is no picture"),
        ([[1, 2], [3, 4]], "1 is no picture"),
        (3.5, "3.5 is no picture"),
        (b"abc", "b'abc' is no picture"),
        ("no/such.png", "no/such.png cannot be opened as a picture (it is no file"),
        ("a\0.png", "it is no file that exists"),
        ("file:///etc/hostname", "it is no file that exists, no http(s) address"),
        ("data:image/png;base64,!!!", "it is no file that exists"),
        (bytes_as_base64, "cannot be opened as a picture"),
        ("", "it is no file that exists"),
        ("x" * 5000, "cannot be opened as a picture"),
        ("http://127.0.0.1:9/a.png", "http://127.0.0.1:9/a.png cannot be fetched ("),
        ("http://", "http:// cannot be fetched ("),
        ("http://[/a.png", "cannot be fetched ("),
    ):
        assert words in refused(processor, image)


def test_an_address_without_a_picture_is_named(server):
    server.contents |= {"words.png": b"no picture", "bomb.png": bomb()}
    assert "gone.png cannot be fetched (HTTP Error 404" in refused(read_image, f"{server.address}/gone.png")
    for name in ("words.png", "bomb.png"):
        assert f"{name} cannot be opened as a picture" in refused(read_image, f"{server.address}/{name}")


@both
def test_options_that_no_picture_can_be_cut_by_are_refused_in_one_sentence(processor):
    picture = Image.fromarray(noise(20, 20, 3))
    for options, words in (
        ({"size": {"shortest_edge": 48}}, "size shortest_edge=48 is no square"),
        ({"size": {"longest_edge": 48}}, "size longest_edge=48 is no square"),
        ({"size": {"height": 16, "width": 32}}, "size 16 x 32 is no square"),
        ({"size": {"height": 0, "width": 0}}, "size 0 x 0 is no square"),
        ({"size": -16}, "size -16 x -16 is no square"),
        ({"max_patches": -1}, "allow no grid"),
        ({"max_patches": 10**9}, "max_patches <= 1024"),
        ({"max_patches": "many"}, "max_patches"),
        ({"max_patches": 2.5}, "max_patches"),
        ({"min_patches": 3, "max_patches": 2}, "allow no grid"),
        ({"input_data_format": "sideways"}, "input_data_format"),
        ({"use_thumbnail": "yes"}, "use_thumbnail"),
    ):
        image = noise(20, 20, 3) if "input_data_format" in options else picture
        assert words in refused(processor, image, **options)
    for size in ((0, 5), (5, -1)):
        assert "cannot be cut into tiles" in refused(processor.get_number_of_image_patches, *size)
    assert "is no square" in refused(processor.get_number_of_image_patches, 5, 5, {"size": {"shortest_edge": 4}})


# --- every picture that Pillow tests itself with ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", ["command line", "pil", "torchvision", "data"])
def test_all_of_pillows_own_test_pictures_are_read_or_refused_in_one_sentence(way, monkeypatch):
    folder = unpacked("pillow", Image.__version__, build_isolation=True) / "Tests"
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".py")
    # Reading is the test; what tiles are cut is tested elsewhere.
    monkeypatch.setattr("mmmamba.image_processing_mmmamba.choose_grid", lambda *arguments: (1, 1))
    reader, num_read = readers(folder)[way], 0
    for file in files:
        try:
            picture = reader(file)
        except ValueError as error:
            message = str(error)
            assert type(error) in (ValueError, BadRow) and file.name in message
            assert "\n" not in message and "0x7" not in message
            continue
        num_read += 1
        if way == "command line":
            with Image.open(file) as opened:
                if opened.mode in ("L", "P", "RGB", "RGBA", "CMYK") and opened.getexif().get(0x0112, 1) == 1:
                    published = np.asarray(opened.convert("RGB"))
                    np.testing.assert_array_equal(np.asarray(picture), published, err_msg=file.name)
    assert len(files) > 700 and num_read > 0.7 * len(files)
