"""What a browser sends is read, or refused with one message, before it can do harm."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lit_gen.demo import uploads
from lit_gen.demo.uploads import boxes_of, read_drawing, read_upload, read_uploads
from lit_gen.errors import ConfigError


def png(height: int, width: int, pixels: bytes | None = None) -> bytes:
    """A gray PNG whose header says height x width, of all zeros if `pixels` is None."""
    rows = b"\0" * ((width + 1) * height) if pixels is None else pixels

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def encoded(kind: str, size: tuple[int, int] = (40, 30), **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[::-1])).save(
        file, kind, **options
    )
    return file.getvalue()


def test_a_picture_is_read_at_any_size(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    picture = read_upload(tmp_path / "a.png", tmp_path, channels=1)
    assert torch.equal(picture[0].flatten(), torch.arange(1200).to(torch.uint8))
    assert read_uploads([tmp_path / "a.png"] * 2, tmp_path, image_size=[8, 6]).shape == (2, 3, 8, 6)


HOSTILE = {
    "bomb of a wide header": (png(60_000, 60_000, b""), "decompression bomb"),
    "more pixels than the page takes": (png(2500, 2500), "more than the 4 million"),
    "text": (b"<script>alert(1)</script>", "cannot be decoded"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "cannot be decoded"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "cannot be decoded"),
    "zip": (b"PK\x03\x04" + b"\0" * 64, "cannot be decoded"),
    "nothing": (b"", "empty file"),
    "truncated PNG": (encoded("PNG")[:-60], "cannot be decoded"),
    "truncated JPEG": (encoded("JPEG")[:400], "cannot be decoded"),
    "header alone": (png(8, 8)[:33], "cannot be decoded"),
    "GIF of a wide screen": (
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + encoded("GIF")[10:],
        "decompression bomb",
    ),
}


@pytest.mark.parametrize(("data", "says"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_files_are_refused(tmp_path, data, says):
    (tmp_path / "upload.png").write_bytes(data)
    with pytest.raises(ConfigError, match=r"upload\.png") as error:
        read_upload(tmp_path / "upload.png", tmp_path)
    assert says in str(error.value)
    with pytest.raises(ConfigError, match="drawing"):
        read_drawing(data)


def test_pixels_are_counted_before_any_is_decoded(tmp_path, monkeypatch):
    """A megabyte that unpacks to a gigabyte is never unpacked."""
    (tmp_path / "a.png").write_bytes(png(2500, 2500))
    monkeypatch.setattr(uploads, "decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ConfigError, match="2500 x 2500"):
        read_upload(tmp_path / "a.png", tmp_path)


def test_large_files_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded("PNG") + b"\0" * uploads.MAX_BYTES)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: pytest.fail("read"))
    with pytest.raises(ConfigError, match=r"8\.0 MiB: at most 8"):
        read_upload(tmp_path / "a.png", tmp_path)


def test_an_animation_of_many_frames_is_its_first(tmp_path):
    frames = [Image.fromarray(np.full((16, 16), i, np.uint8)) for i in range(200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_upload(tmp_path / "a.gif", tmp_path, channels=1).unique().tolist() == [0]


@pytest.mark.parametrize("trick", ["../secret.png", "sub/../../secret.png", "link.png", "/etc/passwd", "sub"])
def test_paths_do_not_leave_the_folder_of_uploads(tmp_path, trick):
    folder = tmp_path / "uploads"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ConfigError, match="not among the uploaded files"):
        read_upload(folder / trick, folder)


def test_the_number_of_pictures_is_limited(tmp_path):
    for given in (None, [], [tmp_path / "a.png"] * 33):
        with pytest.raises(ConfigError, match="between 1 and 32"):
            read_uploads(given, tmp_path, image_size=8)


def test_boxes():
    boxes = boxes_of("1, 2, 3.5, 4\n\n 5 6 7 8 ")
    assert boxes is not None and boxes.tolist() == [[1, 2, 3.5, 4], [5, 6, 7, 8]]
    assert boxes_of(" \n") is None
    for text in ("1,2,3", "3,2,1,4", "a,b,c,d", "nan,0,1,1", "0,0,inf,1", "-1,0,1,1", "1,2,3,4,5"):
        with pytest.raises(ConfigError, match="x0, y0, x1, y1"):
            boxes_of(text)
    with pytest.raises(ConfigError, match="101 boxes"):
        boxes_of("0,0,1,1\n" * 101)
