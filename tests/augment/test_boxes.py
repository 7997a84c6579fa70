"""Geometry: boxes follow the image exactly, visibility in closed form, and nothing crashes on any box."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from lit_gen import rng
from lit_gen.augment import Policy, warps
from lit_gen.augment.boxes import BOX_FORMATS, convert, transform_boxes
from lit_gen.augment.tables import DETECTION
from lit_gen.errors import ConfigError

GEOMETRIC = [name for name in DETECTION if name.endswith("_BBox")]


def image_of(h: int, w: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=rng.keyed_generator("boxes", h, w))


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("sign", [1, -1])
def test_box_follows_the_painted_rectangle(name, sign):
    """A white rectangle on black: the warped rectangle's extent is the warped box, to the half pixel of
    nearest sampling."""
    h, w = 160, 200
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    image[:, 60:90, 70:120] = 255
    boxes = torch.tensor([[70.0, 60, 120, 90]])
    policy = Policy([[[name, 1, 4]]], fill=0)
    op = DETECTION[name]
    draws = {"ops": [{"op": name, "magnitude": sign * op.magnitude(4)}]}
    out, moved, keep = policy.apply(image, boxes, draws)
    ys, xs = (out[0] > 0).nonzero().unbind(1)
    extent = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
    assert keep.all()
    assert (moved[0] - extent).abs().max() <= 1.0
    if name.startswith("Translate"):
        assert torch.equal(moved[0], extent)


def test_rotation_keeps_the_image_centre():
    """Official boxes turn about (W/2, H/2) on pixel corners, the image about the same point: a centred box
    stays centred."""
    box = np.array([[40.0, 30.0, 60.0, 50.0]])
    for degrees in (-30.0, 12.0, 30.0):
        t = warps.rotation([degrees], 80, 100)[0].tolist()
        moved, left = transform_boxes(box, t, 80, 100)
        np.testing.assert_allclose((moved[0, :2] + moved[0, 2:]) / 2, [50, 40], atol=1e-4)
        c, s = np.cos(np.radians(abs(degrees))), np.sin(np.radians(abs(degrees)))
        np.testing.assert_allclose(moved[0, 2:] - moved[0, :2], [20 * (c + s)] * 2, atol=1e-4)
        np.testing.assert_allclose(left, 1, atol=1e-6)


def test_boxes_are_not_requantised():
    boxes = torch.tensor([[10.25, 20.5, 30.75, 40.125]])
    policy = Policy([[["ShearX_BBox", 1, 0], ["TranslateY_BBox", 1, 0]]])
    _, moved, _ = policy.apply(image_of(60, 80), boxes, policy.sample(1, rng.keyed_generator(0)))
    torch.testing.assert_close(moved, boxes)


@pytest.mark.parametrize("shift, kept", [(30, True), (35, True), (37, False), (40, False), (60, False)])
def test_visibility_threshold(shift, kept):
    """A box of width 20 from 20 to 40, image moved left by `shift`: 40 - shift of 20 pixels are left."""
    policy = Policy([[["TranslateX_BBox", 1, 1]]], min_visibility=0.2)
    draws = {"ops": [{"op": "TranslateX_BBox", "magnitude": shift * 640 / 100}]}
    _, moved, keep = policy.apply(image_of(80, 100), torch.tensor([[20.0, 20, 40, 40]]), draws)
    assert keep.tolist() == [kept]
    assert moved[0, 2] == max(0, 40 - shift)


def test_visibility_accumulates_over_ops():
    """Two shifts of 12: 8 of 20, then 8 - 12 < 0; one after the other 12/20 of the rest is lost, too."""
    policy = Policy([[["TranslateX_BBox", 1, 1]]], min_visibility=0.25)
    step = {"op": "TranslateX_BBox", "magnitude": 8 * 6.4}
    boxes = torch.tensor([[0.0, 20, 20, 40]])
    kept = [policy.apply(image_of(80, 100), boxes, {"ops": [step] * n})[2].item() for n in (1, 2, 3)]
    assert kept == [True, False, False]  # 0.6, 0.6 * 4/12 = 0.2, 0


def test_constants_are_relative_to_the_image():
    """At 640 the official pixels; at 64 a tenth of them."""
    for side in (64, 640):
        boxes = torch.tensor([[0.0, 0.0, side, side]])
        policy = Policy([[["TranslateX_BBox", 1, 4]]])
        draws = {"ops": [{"op": "TranslateX_BBox", "magnitude": 100.0}]}
        _, moved, _ = policy.apply(image_of(side, side), boxes, draws)
        assert moved[0, 2] == side - 100 * side / 640


@pytest.mark.parametrize("box_format", BOX_FORMATS)
def test_formats_agree(box_format):
    boxes = np.array([[10.0, 5, 40, 45], [0, 0, 80, 60]])
    np.testing.assert_allclose(
        convert(convert(boxes, "xyxy", box_format, 60, 80), box_format, "xyxy", 60, 80), boxes, atol=1e-12
    )
    policies = [Policy.load("detection_v2", box_format=f) for f in ("xyxy", box_format)]
    given_boxes = torch.from_numpy(convert(boxes, "xyxy", box_format, 60, 80)).float()
    for i in range(30):
        draws = policies[0].sample(2, rng.keyed_generator(i))
        image, moved, keep = policies[0].apply(image_of(60, 80), torch.from_numpy(boxes).float(), draws)
        image_2, moved_2, keep_2 = policies[1].apply(image_of(60, 80), given_boxes, draws)
        pixels = convert(moved_2.numpy(), box_format, "xyxy", 60, 80)
        np.testing.assert_allclose(pixels[keep], moved[keep].numpy(), atol=1e-3)
        assert torch.equal(image, image_2) and torch.equal(keep, keep_2)


numbers = st.one_of(
    st.floats(-2, 3), st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-9, float("nan"), float("inf"), -float("inf")])
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=5),
    st.sampled_from(sorted(DETECTION)),
    st.floats(0, 10),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_no_box_crashes(rows, name, level, h, w, official, seed):
    """Empty, degenerate, inverted, edge, padding and non-finite boxes, all ops, all sizes down to one
    pixel."""
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    policy = Policy([[[name, 1, level], [name, 1, level]]], official=official, box_format="yxyx_normalized")
    image = image_of(h, w)
    draws = json.loads(json.dumps(policy.sample(len(boxes), rng.keyed_generator(seed))))
    out, moved, keep = policy.apply(image, boxes, draws)
    assert out.shape == image.shape and out.dtype == torch.uint8
    assert moved.shape == boxes.shape and keep.shape == (len(boxes),)
    if not official:
        kept, changed = moved[keep], moved[keep & (moved != boxes).any(1)]
        assert kept.isfinite().all() and (kept[:, 2:] > kept[:, :2]).all()
        assert ((changed >= 0) & (changed <= 1)).all()


def test_a_format_by_its_old_name():
    policy = Policy([[["Rotate_BBox", 1, 4]]], box_format="yxyx_normalised")
    assert policy.box_format == "yxyx_normalized"
    with pytest.raises(ConfigError, match="box_format='yx': must be one of xyxy, xywh, cxcywh, yxyx_norm"):
        Policy([[["Rotate_BBox", 1, 4]]], box_format="yx")


def test_padding_rows_pass_through():
    """[-1, -1, -1, -1] stays what it is and is not kept; officially Rotate makes it [0, 0, .05, .05]."""
    padding = torch.full((1, 4), -1.0)
    draws = {"ops": [{"op": "Rotate_BBox", "magnitude": 12.0}]}
    for official in (False, True):
        policy = Policy([[["Rotate_BBox", 1, 4]]], official=official, box_format="yxyx_normalized")
        _, moved, keep = policy.apply(image_of(60, 80), padding, draws)
        if official:
            torch.testing.assert_close(moved, torch.tensor([[0, 0, 0.05, 0.05]]))
        else:
            assert torch.equal(moved, padding) and not keep.any()


def test_warp_of_whole_pixels_is_a_copy():
    """The rectangle copy and the general path agree; so does torchvision's rotation by quarter turns."""
    images = image_of(31, 40).expand(2, 3, 31, 40)
    for dx in (-50, -7, 0, 3, 40):
        t = np.concatenate([warps.translation_x([dx], 31, 40), warps.rotation([17.0], 31, 40)])
        general = warps.warp(images, t)
        assert torch.equal(general[:1], warps.warp(images[:1], t[:1]))
        assert torch.equal(general[1:], warps.warp(images[1:], t[1:]))
    square = image_of(32, 32)[None]
    assert torch.equal(warps.warp(square, warps.rotation([90.0], 32, 32)), F.rotate(square, 90))


@pytest.mark.parametrize("size", [(31, 40), (130, 127), (370, 360), (732, 721)])  # the last not remembered
def test_a_warp_is_its_definition_for_any_channels_and_type(size):
    """Against the nearest pixels by float64, for a map that has none halfway between two."""
    h, w = size
    t = np.array([[0.75, -0.251, 7.0305, 0.374, 1.126, -9.011]], np.float32)
    y, x = np.mgrid[:h, :w]
    from_x, from_y = (np.rint(a * x + b * y + c).astype(int) for a, b, c in t.reshape(2, 3).astype(float))
    inside = torch.from_numpy((from_x >= 0) & (from_x < w) & (from_y >= 0) & (from_y < h))
    kinds = ((3, torch.uint8), (3, torch.bool), (1, torch.uint8), (5, torch.int64))
    for c, dtype in kinds[: 2 if h > 700 else 4]:
        images = torch.stack([image_of(h, w).repeat(2, 1, 1)[:c] + i for i in range(2)]).to(dtype)
        expected = torch.full_like(images, 1)
        expected[..., inside] = images[..., from_y[inside], from_x[inside]]
        assert torch.equal(warps.warp(images, np.repeat(t, 2, 0), 1), expected)
        assert torch.equal(warps.warp(images[:1], t, 1), expected[:1])


def test_fraction_of_a_pixel_rounds_half_away_from_zero():
    """in_x = x + p, nearest, halves up; -0.5 is outside."""
    row = torch.arange(10, 20, dtype=torch.uint8).view(1, 1, 1, 10)
    assert warps.warp(row, warps.translation_x([0.5], 1, 10), 0).flatten().tolist() == [*range(11, 20), 0]
    assert warps.warp(row, warps.translation_x([-0.5], 1, 10), 0).flatten().tolist() == [0, *range(11, 20)]
    assert warps.warp(row, warps.translation_x([-0.4], 1, 10), 0).flatten().tolist() == list(range(10, 20))


def test_a_remembered_map_gives_the_image_of_a_fresh_one():
    """One image at a time uses indices that were kept; a batch makes its own."""
    images = torch.randint(0, 256, (3, 3, 19, 23), dtype=torch.uint8, generator=rng.keyed_generator(0))
    t = warps.rotation([7.0, -31.0, 7.0], 19, 23)
    whole = warps.warp(images, t, 5)
    for _ in range(2):
        rows = [warps.warp(images[i : i + 1], t[i : i + 1], 5) for i in range(3)]
        assert torch.equal(torch.cat(rows), whole)
    assert not torch.equal(whole, warps.warp(images, t, 6))
