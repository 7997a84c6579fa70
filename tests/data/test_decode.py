"""Every kind of picture that folders hold: decoded by a stated rule, or refused with its name."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from lit_gen.data.archive import FolderStore
from lit_gen.data.decode import UPRIGHT, UnreadableImage, decode, fit_to, header_size
from lit_gen.data.reader import ImageReader
from lit_gen.errors import ConfigError


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def colours(h: int = 6, w: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def pixels(data: bytes, name: str = "x.png", **options) -> np.ndarray:
    return decode(data, name, **options).numpy().transpose(1, 2, 0)


def test_rgb_is_taken_as_it_is():
    image = decode(encoded(Image.fromarray(colours())), "x.png")
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    np.testing.assert_array_equal(image.permute(1, 2, 0), colours())


def test_grey_to_rgb_and_back():
    grey = colours()[..., 0]
    data = encoded(Image.fromarray(grey))
    assert (pixels(data) == grey[..., None]).all()
    assert (pixels(data, channels=1)[..., 0] == grey).all()


def test_one_bit_pictures_become_black_and_white():
    bits = colours()[..., 0] > 127
    assert (pixels(encoded(Image.fromarray(bits)), channels=1)[..., 0] == np.where(bits, 255, 0)).all()


def test_palette_and_its_transparency():
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixels(encoded(picture)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert pixels(encoded(picture, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_transparency_is_laid_over_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    got = pixels(encoded(Image.fromarray(rgba)))[0]
    assert got[0].tolist() == [10, 20, 30]
    assert got[1].tolist() == [255, 255, 255]
    assert got[2].tolist() == [127, 127, 127]


@pytest.mark.parametrize(("colour", "samples"), [(0, 1), (2, 3)])
def test_16_bit_samples_give_their_high_byte(colour, samples):
    values = np.random.default_rng(1).integers(0, 65536, (4, 5, samples)).astype(">u2")
    data = png(5, 4, 16, colour, b"".join(b"\0" + row.tobytes() for row in values))
    assert (pixels(data) == (values >> 8)).all()


def test_16_bit_tiff():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert (pixels(encoded(Image.fromarray(values), "TIFF"), "x.tif")[..., 0] == values >> 8).all()


def test_cmyk_jpeg():
    cmyk = Image.fromarray(
        np.full((16, 16, 4), (0, 255, 255, 0), np.uint8), "CMYK"
    )  # no cyan, full magenta and yellow: red
    r, g, b = pixels(encoded(cmyk, "JPEG", quality=100), "x.jpg").reshape(-1, 3).mean(0)
    assert r > 250
    assert g < 5
    assert b < 5


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_the_first_picture_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    """Stored is the picture as the camera held it; EXIF's definition of the 8 orientations says where row and
    column 0 are."""
    upright = colours()
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(pixels(data), upright)
    assert header_size(data, "x.png") == upright.shape[:2]
    assert (orientation in UPRIGHT) == (orientation > 1)


def test_broken_exif_spoils_nothing():
    data = encoded(Image.fromarray(colours()), exif=b"Exif\0\0rubbish that is no TIFF header")
    np.testing.assert_array_equal(pixels(data), colours())


def test_a_lying_extension_is_decoded_by_content():
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(colours())), "x.jpg"), colours())


JPEG = encoded(Image.fromarray(np.tile(colours(), (8, 8, 1))), "JPEG")
BAD = {
    "empty": (b"", "empty file"),
    "text": (b"this is no picture", "cannot be decoded"),
    "truncated-jpeg": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "truncated-png": (encoded(Image.fromarray(colours(64, 64)))[:-300], "cannot be decoded"),
    "float": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32-bit samples"),
    "postscript": (encoded(Image.fromarray(colours()), "EPS"), "cannot be decoded"),
    "bomb": (png(30_000, 30_000, 8, 0, bytes(1000)), "cannot be decoded|decompression bomb"),
    "smaller-bomb": (
        png(8_001, 8_000, 8, 0, bytes(1000)),
        "8001x8000 pixels, more than the 64 million allowed",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_named(kind):
    data, reason = BAD[kind]
    with pytest.raises(UnreadableImage, match=rf"some/file\.png: .*({reason})"):
        decode(data, "some/file.png")


def odd_pictures() -> dict[str, tuple[str, bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(colours())
    return {
        "CMYK": ("x.jpg", encoded(picture.convert("CMYK"), "JPEG")),
        "16-bit": ("x.png", png(1, 1, 16, 2, b"\0" + bytes(6))),
        "animation": (
            "x.gif",
            encoded(picture, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6))]),
        ),
        "palette": ("x.png", encoded(picture.quantize(4))),
        "transparency": ("x.png", encoded(picture.convert("RGBA"))),
        "EXIF rotation": ("x.jpg", encoded(picture, "JPEG", exif=exif)),
        "another extension": ("x.jpg", encoded(picture)),
    }


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_decode_or_raise_one_kind_of_error(data):
    name, good = data.draw(st.sampled_from([*odd_pictures().values(), ("x.jpg", JPEG)]))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    try:
        image = decode(damaged, name, image_size=4)
    except UnreadableImage as error:
        assert name in str(error)
    else:
        assert image.shape == (3, 4, 4)


def test_crop_is_the_centre_square_resized_by_lanczos():
    picture = Image.fromarray(colours(9, 20))
    expected = picture.crop((5, 0, 14, 9)).resize((4, 4), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(fit_to(picture, 4, "crop"), expected)
    np.testing.assert_array_equal(fit_to(picture, 9, "crop"), colours(9, 20)[:, 5:14])


def test_stretch_keeps_all_of_the_picture():
    picture = Image.fromarray(colours(9, 20))
    np.testing.assert_array_equal(
        fit_to(picture, 4, "stretch"), picture.resize((4, 4), Image.Resampling.LANCZOS)
    )


def test_adm_halves_by_box_filter_before_the_bicubic():
    picture = Image.fromarray(colours(32, 48))
    box = (
        colours(32, 48)
        .astype(float)
        .reshape(16, 2, 24, 2, 3)
        .mean((1, 3))
        .reshape(8, 2, 12, 2, 3)
        .mean((1, 3))
    )
    got = np.asarray(fit_to(picture, 8, "adm")).astype(float)
    assert (
        np.abs(got - box[:, 2:10]).max() < 2
    )  # Pillow rounds each halving; the bicubic at scale 1 changes nothing
    assert fit_to(picture, 7, "adm").size == (7, 7)


@pytest.mark.parametrize("fit", ["crop", "stretch", "adm"])
@given(h=st.integers(1, 40), w=st.integers(1, 40), size=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_every_fit_gives_the_size_asked_for_and_keeps_flat_colours(fit, h, w, size):
    assert (np.asarray(fit_to(Image.new("RGB", (w, h), (7, 77, 177)), size, fit)) == (7, 77, 177)).all()
    assert fit_to(Image.new("L", (w, h)), size, fit).size == (size, size)


def write(folder, files: dict[str, bytes]) -> FolderStore:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return FolderStore(folder)


def test_a_scan_tells_what_headers_tell_and_asked_for_what_pixels_do(tmp_path):
    good = {f"good{i}.png": encoded(Image.fromarray(colours())) for i in range(40)}
    store = write(tmp_path / "s", good | {f"{kind}.png": data for kind, (data, _) in BAD.items()})
    sizes, bad = ImageReader(store).scan(store.names, decode_all=True)
    assert sizes == dict.fromkeys(good, (6, 8))
    assert set(bad) == {f"{kind}.png" for kind in BAD}
    sizes, bad = ImageReader(store).scan(store.names)
    truncated = {"truncated-jpeg.png", "truncated-png.png"}  # whose headers are whole
    assert set(sizes) == set(good) | truncated
    assert set(bad) == {f"{kind}.png" for kind in BAD} - truncated


def counted(store) -> list[tuple[str, int | None]]:
    """What is read of the store from now on: (name, first)."""
    calls, read = [], store.read

    def counting(name, first=None):
        calls.append((name, first))
        return read(name, first)

    store.read = counting
    return calls


def test_a_scan_reads_and_decodes_no_more_than_headers(tmp_path, monkeypatch):
    large = encoded(Image.fromarray(colours(300, 400)))
    assert len(large) > 300_000
    jpeg = encoded(Image.fromarray(colours(200, 300)), "JPEG", quality=95)
    store = write(
        tmp_path / "s", {"a.png": large, "b.jpg": jpeg, "c.png": encoded(Image.fromarray(colours()))}
    )
    calls = counted(store)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda picture: pytest.fail("decoded"))
    sizes, bad = ImageReader(store, image_size=4).scan(store.names)
    assert (sizes, bad) == ({"a.png": (300, 400), "b.jpg": (200, 300), "c.png": (6, 8)}, {})
    assert len(calls) == 3 and all(first == 1 << 14 for _, first in calls)


def test_a_header_longer_than_the_first_bytes_is_read_on(tmp_path):
    """A colour profile of 100 KiB comes before the size in a JPEG."""
    data = encoded(Image.fromarray(colours(16, 24)), "JPEG", icc_profile=bytes(100_000))
    assert data.find(b"\xff\xc0") > 1 << 14
    store = write(tmp_path / "s", {"a.jpg": data})
    assert ImageReader(store).scan(store.names) == ({"a.jpg": (16, 24)}, {})


def test_metadata_behind_the_pixels_turn_the_size_when_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(colours(200, 300)))
    data = data[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    assert pixels(data).shape == (300, 200, 3)
    store = write(tmp_path / "s", {"a.png": data})
    assert ImageReader(store).scan(store.names, turned=True)[0] == {"a.png": (300, 200)}


def smooth(h: int, w: int) -> Image.Image:
    """A picture of many frequencies with little noise, as photographs have them."""
    g = np.random.default_rng(h + w)
    layers = [
        np.asarray(
            Image.fromarray(g.integers(0, 256, (h // k + 2, w // k + 2, 3), np.uint8)).resize(
                (w, h), Image.Resampling.BICUBIC
            ),
            float,
        )
        for k in (64, 32, 16, 8)
    ]
    return Image.fromarray(np.average(layers, 0, weights=(8, 4, 2, 1)).astype(np.uint8))


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(375, 501), (640, 301), (1000, 1003)])
def test_a_draft_is_the_picture_to_40_db(fit, orientation, size):
    """Odd sizes, whose last pixels a smaller decoding covers in part, and pictures that are turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(*size), "JPEG", quality=92, exif=exif)
    whole, draft = (pixels(data, "x.jpg", image_size=48, fit=fit, draft=d) for d in (False, True))
    assert not np.array_equal(whole, draft)
    assert 10 * np.log10(255**2 / np.square(whole.astype(float) - draft).mean()) > 40


@pytest.mark.parametrize(
    ("size", "image_size", "decoded"),
    [((375, 500), 64, (188, 250)), ((375, 500), 93, (188, 250)), ((375, 500), 94, (375, 500)),
     ((375, 500), 32, (94, 125)), ((2000, 3000), 32, (250, 375))],
)  # fmt: skip
def test_a_draft_keeps_twice_the_pixels_that_are_asked_for(size, image_size, decoded, monkeypatch):
    loaded = []
    load = JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "load", lambda p: (load(p), loaded.append(p.size[::-1]))[0]
    )
    data = encoded(Image.new("RGB", size[::-1]), "JPEG")
    for fit in ("crop", "stretch"):
        decode(data, "x.jpg", image_size=image_size, fit=fit, draft=True)
    assert set(loaded) == {decoded}


@pytest.mark.parametrize("fit", ["adm", "shorter"])
def test_published_fits_and_what_is_no_jpeg_are_decoded_whole(fit):
    jpeg, png_data = encoded(smooth(400, 500), "JPEG"), encoded(smooth(400, 500))
    for data, how in ((jpeg, fit), (png_data, "crop")):
        exact = decode(data, "x", image_size=32, fit=how)
        assert torch.equal(decode(data, "x", image_size=32, fit=how, draft=True), exact)
    plain = decode(jpeg, "x.jpg")
    assert torch.equal(decode(jpeg, "x.jpg", draft=True), plain)  # nothing is made smaller


def test_the_cache_keeps_all_or_nothing(tmp_path):
    store = write(
        tmp_path / "s", {f"{i}.png": encoded(Image.fromarray(colours(256, 256) // (i + 1))) for i in range(6)}
    )
    kept, dropped = (
        ImageReader(store, cache_mib=2),
        ImageReader(store, cache_mib=1),
    )  # 6 x 192 KiB = 1.125 MiB
    for reader in (kept, dropped):
        reader.scan(store.names)
        for name in store.names:
            first = reader.read(name)
            assert torch.equal(reader.read(name), first)
    for file in store.path.iterdir():
        file.rename(file.with_suffix(".gone"))
    assert kept.read("5.png").float().mean() < kept.read("0.png").float().mean()
    with pytest.raises(ConfigError, match=r"5\.png: cannot be read"):
        dropped.read("5.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"image_size": [4, 6], "fit": "shorter"}, "fit=shorter"),
        ({"fit": "middle"}, "fit='middle': must be one of crop, stretch, adm, shorter"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        ImageReader(FolderStore(tmp_path), **options)
    with pytest.raises(ConfigError, match="on_error='ignore': must be one of raise, skip, replace"):
        ImageReader(FolderStore(tmp_path), on_error="ignore")


@given(h=st.integers(1, 60), w=st.integers(1, 60), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_shorter_is_torchvisions_resize(h, w, size):
    from torchvision.transforms import Resize

    picture = Image.fromarray(colours(h, w))
    np.testing.assert_array_equal(fit_to(picture, size, "shorter"), Resize(size)(picture))
