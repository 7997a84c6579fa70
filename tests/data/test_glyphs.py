"""Rendered letters: enough faces, all different, all readable, each letter in the same place, pairs that are
pairs."""

import pytest
import torch

from lit_gen.data.glyphs import LETTERS, Glyphs, embedded_faces
from lit_gen.errors import ConfigError

SOME = ["DejaVuSans", "DejaVuSerif-Bold/wide", "STIXGeneral/fraktur", "cmr10/outline"]


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return Glyphs()


@pytest.fixture(scope="module")
def ink(glyphs) -> torch.Tensor:
    """(faces, letters, 64, 64) in [0, 1], 1 = ink."""
    return 1 - glyphs.images.reshape(len(glyphs.classes), len(LETTERS), 64, 64) / 255


def test_the_contract(glyphs):
    assert len(glyphs.classes) == len(set(glyphs.classes)) == len(embedded_faces()) == 124
    assert len(glyphs) == 124 * 52
    item = glyphs[52 * 3 + 7]
    assert item["image"].shape == (1, 64, 64)
    assert item["image"].dtype == torch.uint8
    assert (item["label"], item["content"]) == (3, 7)
    batch = glyphs.batch([52 * 3 + 7, 0])
    assert torch.equal(batch["image"][0], item["image"])
    assert batch["label"].tolist() == [3, 0]
    assert batch["content"].tolist() == [7, 0]


def test_no_letter_is_blank_solid_or_cut_off(ink):
    share = ink.mean((2, 3))
    assert share.min() > 0.004
    assert share.max() < 0.45
    assert max(ink[..., 0, :].max(), ink[..., -1, :].max(), ink[..., :, 0].max(), ink[..., :, -1].max()) == 0


def test_letters_stand_on_one_line_in_the_middle(ink):
    flat = [LETTERS.index(c) for c in "ABDEHIKLMNPRTXZ"]  # no round letters, which overshoot
    rows = torch.arange(64)
    columns = ink.amax(2) > 0.1
    for name, face, column in zip(Glyphs().classes, ink, columns, strict=True):
        if "fraktur" in name or "script" in name:
            continue
        bottoms = [(rows[(face[i] > 0.4).any(1)]).max().item() for i in flat]
        assert max(bottoms) - min(bottoms) <= 3, name
        for i in range(52):
            where = rows[column[i]]
            assert abs(where.min() + where.max() - 63) <= 1, (name, LETTERS[i])


def test_every_face_differs_from_every_other(ink):
    small = torch.nn.functional.avg_pool2d(ink, 2).flatten(1)
    distance = torch.cdist(small, small, p=1) / small.shape[1]
    distance.fill_diagonal_(1)
    assert distance.min() > 0.01
    assert distance.min(1).values.median() > 0.25 * ink.mean()


def test_letters_can_be_read_across_faces(glyphs, ink):
    """The nearest letter of all other font files is the same one; Cc, Oo ... differ in size alone and may be
    confused."""
    small = torch.nn.functional.avg_pool2d(ink, 4).reshape(-1, 256)
    small = torch.nn.functional.normalize(small, dim=1)
    files = {name: k for k, name in enumerate({face.file for face in glyphs.faces})}
    file = torch.tensor([files[face.file] for face in glyphs.faces]).repeat_interleave(52)
    letter = torch.tensor([ord(c.lower()) for c in LETTERS]).repeat(len(glyphs.faces))
    nearest = (small @ small.T).masked_fill(file[:, None] == file, -1).argmax(1)
    assert (letter[nearest] == letter).float().mean() > 0.8  # chance: 0.04


def test_faces_can_be_told_from_few_letters(ink):
    """The mean of 20 letters of a face is nearest to the mean of its other 32: a face is a class."""
    order = torch.randperm(52, generator=torch.Generator().manual_seed(0))
    some, others = ink[:, order[:26]].mean(1).flatten(1), ink[:, order[26:]].mean(1).flatten(1)
    assert (
        torch.cdist(some, others).argmin(1) == torch.arange(len(ink))
    ).float().mean() > 0.3  # chance: 0.008


def test_rendering_is_deterministic_and_independent_of_the_company(glyphs):
    few = Glyphs(classes=SOME)
    for k, name in enumerate(SOME):
        at = glyphs.classes.index(name) * 52
        assert torch.equal(few.images[k * 52 : k * 52 + 52], glyphs.images[at : at + 52])
    assert few.fingerprint() == Glyphs(classes=SOME).fingerprint()
    assert few.fingerprint() != Glyphs(classes=SOME[::-1]).fingerprint()


def test_pairs_share_the_letter(glyphs):
    i = 52 * 5 + 9
    target = glyphs.paired(i, SOME[2])
    j = glyphs.classes.index(SOME[2]) * 52 + 9
    assert torch.equal(target, glyphs[j]["image"])
    assert glyphs[j]["content"] == glyphs[i]["content"]
    with pytest.raises(ConfigError, match="'Arial' is none of the 124 faces"):
        glyphs.paired(0, "Arial")


def test_size_and_channels():
    data = Glyphs(32, channels=3, classes=SOME[:1], characters="AB")
    assert data[1]["image"].shape == (3, 32, 32)
    assert (data[1]["image"][0] == data[1]["image"][2]).all()


def test_digits_where_the_alphabet_has_them():
    assert len(Glyphs(classes=["DejaVuSans", "STIXGeneral/sans"], characters="0123456789")) == 20
    with pytest.raises(ConfigError, match="Unicode has no fraktur form of '0'"):
        Glyphs(classes=["STIXGeneral/fraktur"], characters="A0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "image_size=4"),
        ({"channels": 2}, "channels=2"),
        ({"characters": "AAB"}, "characters='AAB'"),
        ({"classes": ["Arial"]}, "Unknown face 'Arial'; the 124 known begin with DejaVuSans"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Glyphs(**options)


def test_a_character_that_a_font_lacks():
    with pytest.raises(ConfigError, match=r"cmr10\.ttf has no '\\u4e2d'|cmr10\.ttf has no '中'"):
        Glyphs(classes=["cmr10"], characters="中")
