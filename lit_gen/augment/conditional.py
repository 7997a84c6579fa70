"""Non-leaking augmentation for generative training: the network is told what was done to its input.

EDM's pipe (Karras et al. 2022, Appendix F.2 and Table 6, https://arxiv.org/abs/2206.00364), the geometric
part of which is StyleGAN2-ADA's (Appendix B, https://arxiv.org/abs/2006.06676) without its leaking: each
transformation happens with its own probability and leaves its parameters in a label vector, which is zero for
an untouched image and at sampling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gen import rng
from lit_gen.errors import ConfigError

# The scaling filter of Daubechies' least-asymmetric wavelet with six vanishing moments ("sym6"): the low-pass
# of the resampling.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.491055941926747, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
PIXEL_FLIPS = ("xflip", "yflip", "rotate_int", "translate_int")
GEOMETRY = ("scale", "rotate_frac", "aniso", "translate_frac")
COLORS = ("brightness", "contrast", "lumaflip", "hue", "saturation")
TRANSFORMATIONS = PIXEL_FLIPS + GEOMETRY + COLORS
PAIRS = ("rotate_int", "translate_int", "rotate_frac", "aniso", "translate_frac", "hue")  # of two labels
LUMA = 1 / math.sqrt(3)  # each coordinate of the direction in which R, G and B are equal


@dataclass(frozen=True)
class ConditionalAugment:
    """Augments float images (B, C, H, W) and returns labels (B, label_dim) that say how.

    `p` is the overall probability; each transformation has a multiplier of it, 0 = off. The defaults are
    EDM's for CIFAR-10 (p = .12; .15 for FFHQ and AFHQ): 9 labels, in the order of the fields below. `draw`
    and `apply` are apart; calling does both. Transformations named in `untold` have no part in the labels, so
    that samples have them too: symmetries of the images, as the flips of a data loader.
    """

    p: float = 0.12
    xflip: float = 1e8  # so that a flip is always drawn: it is no augmentation but a symmetry
    yflip: float = 1
    rotate_int: float = 0  # by quarter turns
    translate_int: float = 0  # by whole pixels, reflected
    scale: float = 1
    rotate_frac: float = 1
    aniso: float = 1  # stretching along a random axis
    translate_frac: float = 1
    brightness: float = 0
    contrast: float = 0
    lumaflip: float = 0
    hue: float = 0
    saturation: float = 0
    translate_int_max: float = 0.125  # share of the image's side
    scale_std: float = 0.2  # of log2
    rotate_frac_max: float = 1  # of pi
    aniso_std: float = 0.2  # of log2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125
    brightness_std: float = 0.2
    contrast_std: float = 0.5  # of log2
    hue_max: float = 1  # of pi
    saturation_std: float = 1  # of log2
    untold: Sequence[str] = ()

    def __post_init__(self):
        negative = [name for name, value in vars(self).items() if name != "untold" and value < 0]
        if negative:
            raise ConfigError(
                f"ConditionalAugment: {', '.join(negative)} must not be negative; 0 turns one off."
            )
        if unknown := sorted(set(self.untold) - set(TRANSFORMATIONS)):
            raise ConfigError(
                f"ConditionalAugment: untold={unknown}; there are {', '.join(TRANSFORMATIONS)}."
            )

    @property
    def active(self) -> tuple[str, ...]:
        """The transformations that are on, in order."""
        return tuple(name for name in TRANSFORMATIONS if getattr(self, name) > 0)

    @property
    def label_dim(self) -> int:
        """The length of the label vector."""
        return sum(2 if name in PAIRS else 1 for name in self._told)

    @property
    def _told(self) -> list[str]:
        return [name for name in self.active if name not in self.untold]

    def __call__(self, images: Tensor, generator: rng.Generator = None) -> tuple[Tensor, Tensor]:
        """(images, labels), drawn from `generator`."""
        return self.apply(images, self.draw(len(images), generator, images.device))

    def draw(
        self, n: int, generator: rng.Generator = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """The parameters of n images, (n,) or (n, 2) a transformation; 0 where it does not happen."""
        draws = {}
        for name in self.active:
            value = self._parameter(name, n, generator, device)
            happens = rng.rand((n,), generator, device=device) < getattr(self, name) * self.p
            draws[name] = torch.where(
                happens.view(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value)
            )
            if name == "aniso":
                turned = rng.rand((n,), generator, device=device) < self.aniso_rotate_prob
                angle = (2 * rng.rand((n,), generator, device=device) - 1) * math.pi
                draws["aniso_angle"] = torch.where(turned, angle, torch.zeros_like(angle))
        return draws

    def _parameter(self, name: str, n: int, generator: rng.Generator, device: torch.device | str) -> Tensor:
        if name in ("xflip", "yflip", "lumaflip", "rotate_int"):
            return rng.randint(0, 4 if name == "rotate_int" else 2, (n,), generator, device=device)
        if name == "translate_int":
            return 2 * rng.rand((n, 2), generator, device=device) - 1
        if name in ("rotate_frac", "hue"):
            full = math.pi * (self.rotate_frac_max if name == "rotate_frac" else self.hue_max)
            return (2 * rng.rand((n,), generator, device=device) - 1) * full
        return rng.randn((n, 2) if name == "translate_frac" else (n,), generator, device=device)

    def apply(self, images: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(images, labels float32) under the drawn parameters; differentiable in the images.

        In float32 or wider whatever the autocast: bfloat16 filters would move images that nothing was drawn
        for by a gray level. Waits for no device.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ConfigError(
                f"ConditionalAugment takes float (B, C, H, W), got {images.dtype} {tuple(images.shape)}."
            )
        if images.shape[1] not in (1, 3) and any(name in COLORS for name in self.active):
            raise ConfigError(
                f"Color augmentation needs 1 or 3 channels, got {images.shape[1]}; set its fields to 0."
            )
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(torch.promote_types(images.dtype, torch.float32))
            labels = [torch.zeros(len(images), 0, device=images.device)]
            labels += [self._label(name, draws, images).to(torch.float32) for name in self._told]
            images = _flip_and_shift(images, draws, self.translate_int_max)
            if any(name in GEOMETRY for name in self.active):
                images = _resample(images, self._inverse_map(draws, images))
            if any(name in COLORS for name in self.active):
                images = _recolor(images, self._color_map(draws, images))
            return images, torch.cat(labels, 1)

    def _label(self, name: str, draws: dict[str, Tensor], images: Tensor) -> Tensor:
        w = draws[name]
        if name == "translate_int":  # the move in whole pixels is what is told
            reach = _constant([side * self.translate_int_max for side in images.shape[:1:-1]], w)
            return (w * reach).round() / reach
        if name == "rotate_int":
            return torch.stack([(w == 1) | (w == 2), (w == 2) | (w == 3)], 1)
        if name in ("rotate_frac", "hue"):
            return torch.stack([w.cos() - 1, w.sin()], 1)
        if name == "aniso":
            angle = draws["aniso_angle"]
            return torch.stack([w * angle.cos(), w * angle.sin()], 1)
        return w.view(len(w), -1)

    def _inverse_map(self, draws: dict[str, Tensor], images: Tensor) -> Tensor:
        """(B, 3, 3): output to input pixel coordinates about the image's center."""
        h, w = images.shape[-2:]
        m = torch.eye(3, device=images.device).expand(len(images), 3, 3)
        if "scale" in draws:
            s = (-draws["scale"] * self.scale_std).exp2()
            m = m @ _diagonal(s, s)
        if "rotate_frac" in draws:
            m = m @ _rotation(draws["rotate_frac"])
        if "aniso" in draws:
            s, angle = (-draws["aniso"] * self.aniso_std).exp2(), draws["aniso_angle"]
            m = m @ _rotation(-angle) @ _diagonal(s, 1 / s) @ _rotation(angle)
        if "translate_frac" in draws:
            shift = -draws["translate_frac"] * self.translate_frac_std
            m = m @ _translation(shift[:, 0] * w, shift[:, 1] * h)
        return m

    def _color_map(self, draws: dict[str, Tensor], images: Tensor) -> Tensor:
        """(B, 3, 4): affine map of the RGB vector; `axis` is the luma direction."""
        n, device = len(images), images.device
        axis = torch.full((3, 1), LUMA, device=device)
        along, eye = axis @ axis.T, torch.eye(3, device=device)
        matrix, offset = eye.expand(n, 3, 3), torch.zeros(n, 3, 1, device=device)

        def column(name: str) -> Tensor:
            return draws[name].view(n, 1, 1).to(torch.float32)

        if "brightness" in draws:
            offset = offset + column("brightness") * self.brightness_std
        if "contrast" in draws:
            c = (column("contrast") * self.contrast_std).exp2()
            matrix, offset = c * matrix, c * offset
        steps = []
        if "lumaflip" in draws:
            steps.append(eye - 2 * along * column("lumaflip"))
        if "hue" in draws:
            steps.append(_about((LUMA,) * 3, column("hue")))
        if "saturation" in draws:
            steps.append(along + (eye - along) * (column("saturation") * self.saturation_std).exp2())
        for step in steps:
            matrix, offset = step @ matrix, step @ offset
        return torch.cat([matrix, offset], 2)


def _constant(values: Sequence[float], like: Tensor) -> Tensor:
    """The numbers in the dtype and on the device of `like`, filled in there: a copy would wait for it."""
    return torch.cat([like.new_full((1,), value) for value in values])


def _rows(*rows: tuple) -> Tensor:
    """(B, r, c) from numbers and (B,) tensors."""
    like = next(x for row in rows for x in row if isinstance(x, Tensor))
    tensors = [[x if isinstance(x, Tensor) else torch.full_like(like, x) for x in row] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in tensors], -2)


def _rotation(a: Tensor) -> Tensor:
    return _rows((a.cos(), -a.sin(), 0), (a.sin(), a.cos(), 0), (0, 0, 1))


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    return _rows((x, 0, 0), (0, y, 0), (0, 0, 1))


def _translation(x: Tensor, y: Tensor) -> Tensor:
    one = torch.ones_like(x)
    return _rows((one, 0, x), (0, one, y), (0, 0, one))


def _about(axis: Sequence[float], angle: Tensor) -> Tensor:
    """Rotation by `angle` (B, 1, 1) about a unit vector (Rodrigues); (B, 3, 3)."""
    x, y, z = axis
    cross = _constant([0, -z, y, z, 0, -x, -y, x, 0], angle).view(3, 3)
    eye = torch.eye(3, device=angle.device)
    return eye + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)


def _flip_and_shift(images: Tensor, draws: dict[str, Tensor], share: float) -> Tensor:
    def chosen(mask: Tensor, new: Tensor) -> Tensor:
        return torch.where(mask.view(-1, 1, 1, 1), new, images)

    for name, dim in (("xflip", 3), ("yflip", 2)):
        if name in draws:
            images = chosen(draws[name] == 1, images.flip(dim))
    if "rotate_int" in draws:
        if images.shape[2] != images.shape[3]:
            raise ConfigError(
                f"Quarter turns need square images, got {tuple(images.shape[2:])}; set rotate_int=0."
            )
        turned = [images.rot90(k, (2, 3)) for k in (1, 2, 3)]
        for k, turn in enumerate(turned, 1):
            images = chosen(draws["rotate_int"] == k, turn)
    if "translate_int" in draws:
        images = _shift_reflected(images, draws["translate_int"] * share)
    return images


def _shift_reflected(images: Tensor, shares: Tensor) -> Tensor:
    """Content moves right and, as in the official code, up by round(shares (B, 2) of the sides); mirrored."""
    b, _, h, w = images.shape
    moved = []
    for size, share in ((w, shares[:, 0]), (h, -shares[:, 1])):
        steps = (share * size).round().long()[:, None]
        at = (torch.arange(size, device=images.device) - steps) % max(1, 2 * size - 2)
        moved.append(size - 1 - (size - 1 - at).abs())
    x, y = moved
    return images[
        torch.arange(b, device=images.device)[:, None, None], :, y[:, :, None], x[:, None, :]
    ].permute(0, 3, 1, 2)


def _resample(images: Tensor, inverse: Tensor) -> Tensor:
    """The images seen through `inverse`: padded by reflection, twice upsampled, bilinear, low-passed and
    downsampled."""
    h, w = images.shape[-2:]
    taps = _constant(SYM6, images)
    extra = len(SYM6) // 4
    left, top, right, bottom = _margins(inverse, h, w, 2 * extra)
    images = F.pad(images, [left, right, top, bottom], mode="reflect")
    images = _upsample(_upsample(images, taps, 3), taps, 2)
    # Into the coordinates of the padded, doubled image, whose pixels lie half a pixel off, and grid_sample's
    # -1..1.
    out_h, out_w = 2 * (h + 2 * extra), 2 * (w + 2 * extra)
    in_h, in_w = images.shape[-2:]
    one = torch.ones(len(images), device=images.device)
    center = _translation(one * (left - right) / 2, one * (top - bottom) / 2)
    half = _translation(one * -0.5, one * -0.5)
    back = _translation(one * 0.5, one * 0.5)
    m = half @ _diagonal(2 * one, 2 * one) @ center @ inverse @ _diagonal(one / 2, one / 2) @ back
    m = _diagonal(one * 2 / in_w, one * 2 / in_h) @ m @ _diagonal(one * out_w / 2, one * out_h / 2)
    grid = F.affine_grid(m[:, :2].to(images.dtype), [*images.shape[:2], out_h, out_w], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    images = _downsample(_downsample(images, taps, 3), taps, 2)
    return images[..., extra:-extra, extra:-extra]


def _margins(inverse: Tensor, h: int, w: int, extra: int) -> list[int]:
    """How many pixels beyond the image the maps reach: left, top, right, bottom; at most what can be
    reflected.

    All of that where a look at the maps would wait for the device: images are the same but for rounding, and
    two to three times as many pixels are filtered.
    """
    if inverse.device.type != "cpu":
        return [w - 1, h - 1, w - 1, h - 1]
    x, y = (w - 1) / 2, (h - 1) / 2
    corners = torch.tensor([[-x, x, x, -x], [-y, -y, y, y], [1.0, 1, 1, 1]])
    reach = (inverse @ corners)[:, :2].permute(1, 0, 2).flatten(1)
    reach = torch.cat([-reach.amin(1), reach.amax(1)]).numpy() + np.array(
        [extra - x, extra - y] * 2, np.float32
    )
    return np.ceil(np.clip(reach, 0, [w - 1, h - 1] * 2)).astype(int).tolist()


def _filter(images: Tensor, taps: Tensor, dim: int, pad: int, stride: int) -> Tensor:
    c = images.shape[1]
    shape, padding, strides = [c, 1, 1, 1], [0, 0], [1, 1]
    shape[dim], padding[dim - 2], strides[dim - 2] = len(taps), pad, stride
    weight = taps.view([-1 if d == dim else 1 for d in range(4)]).expand(shape)
    return F.conv2d(images, weight, stride=strides, padding=padding, groups=c)


def _upsample(images: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Zeros between the pixels, then the low-pass."""
    zeros = torch.stack([images, torch.zeros_like(images)], dim + 1).flatten(dim, dim + 1)
    return _filter(zeros.narrow(dim, 0, zeros.shape[dim] - 1), taps.flip(0), dim, (len(taps) + 1) // 2, 1)


def _downsample(images: Tensor, taps: Tensor, dim: int) -> Tensor:
    return _filter(images, taps, dim, (len(taps) - 1) // 2, 2)


def _recolor(images: Tensor, m: Tensor) -> Tensor:
    if images.shape[1] == 1:  # gray stays gray: the mean over the channels of its map
        m = torch.cat([m[..., :3].sum((1, 2))[:, None, None] / 3, m[..., 3:].mean(1, keepdim=True)], 2)
    flat = images.flatten(2)
    return (m[..., :-1].to(images.dtype) @ flat + m[..., -1:].to(images.dtype)).view(images.shape)
