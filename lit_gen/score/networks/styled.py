"""A network that draws what a content image shows in a style that other images show."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gen.errors import ConfigError
from lit_gen.score.networks import embeddings, layers

__all__ = ["StyledUNet"]


class StyledUNet(nn.Module):
    """A U-Net of patches in two resolutions, told a content image (B, C, H, W) as the image of its condition
    and a style code (B, code_size) as the vector, which scales and shifts the norm of every block.

    The network sees the content as it is and warped by an affine map that content and code choose (Jaderberg
    et al. 2015, https://arxiv.org/abs/1506.02025), at first the identity. Both are also added to the output,
    by learned weights that depend on the noise label, ln(sigma) / 4 at the start: of pure noise the first
    estimate is the content.

    Raises ConfigError for an image size that is no multiple of 8 and of 2 patch_size.
    """

    identity: Tensor
    kernel: Tensor

    def __init__(
        self,
        image_size: layers.ImageSize,  # one number, or (height, width)
        channels: int = 1,
        patch_size: int = 2,
        outer_width: int = 32,  # of the patches
        width: int = 96,  # of squares of 2 x 2 patches, where most of the work is done
        num_blocks: int = 4,  # of these, every second with attention
        code_size: int = 128,
        encoder_width: int = 32,  # of the encoders of the style and of the place, at half the size
        emb_width: int = 256,
        content_blur: float = 0.0,  # pixels, standard deviation: what is left of the content's style
    ):
        super().__init__()
        height, breadth = sides = layers.height_and_width(image_size)
        if any(side % 8 or side % (2 * patch_size) for side in sides):
            raise ConfigError(
                f"image_size={image_size}: StyledUNet takes multiples of 8 and of "
                f"2 patch_size={2 * patch_size}."
            )
        self.channels = self.out_channels = self.condition_channels = channels
        self.num_classes, self.augment_dim, self.vector_dim = 0, 0, code_size
        self.patch_size = patch_size
        self.register_buffer("kernel", _gaussian(content_blur, channels), persistent=False)
        wide, patch = 4 * encoder_width, channels * patch_size**2
        self.style = nn.Sequential(
            *_halvings(channels, encoder_width),
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(wide, code_size),
        )
        self.place = nn.Sequential(
            *_halvings(channels, encoder_width), nn.Flatten(), nn.Linear(wide * height * breadth // 64, wide)
        )
        self.place_code = nn.Linear(code_size, wide)
        self.map = layers.zeroed(nn.Linear(wide, 6))
        self.register_buffer("identity", torch.eye(2, 3), persistent=False)
        self.noise = embeddings.PositionalEmbedding(64)
        self.hidden, self.emb = nn.Linear(64 + code_size, emb_width), nn.Linear(emb_width, emb_width)
        self.copied = layers.zeroed(nn.Linear(emb_width, 2))
        nn.init.constant_(self.copied.bias, 0.8)
        self.stem = nn.Conv2d(3 * patch, outer_width, 3, padding=1)
        self.first = _Block(outer_width, outer_width, emb_width)
        self.down = nn.Conv2d(outer_width, width, 4, 2, 1)
        self.blocks = nn.ModuleList(_Block(width, width, emb_width, i % 2 == 1) for i in range(num_blocks))
        self.up = nn.Conv2d(width, 4 * outer_width, 1)
        self.last = _Block(2 * outer_width, outer_width, emb_width)
        head = layers.zeroed(nn.Conv2d(outer_width, patch, 3, padding=1))
        self.head = nn.Sequential(layers.group_norm(outer_width), nn.SiLU(), head)

    def style_code(self, images: Tensor) -> Tensor:
        """(B, K, C, H, W) -> (B, code_size): the mean of the codes of K images, as in FUNIT."""
        return self.style(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)

    def blurred(self, image: Tensor) -> Tensor:
        """The content image (B, C, H, W) as the network sees it."""
        if (side := self.kernel.shape[-1] // 2) == 0:
            return image
        padded = F.pad(image, (side,) * 4, mode="replicate")
        return F.conv2d(padded, self.kernel.to(image.dtype), groups=self.channels)

    def warped(self, image: Tensor, code: Tensor) -> Tensor:
        """The content image (B, C, H, W) as the code wants it to be placed."""
        change = self.map(F.silu(self.place(image) + self.place_code(code))).view(-1, 2, 3)
        grid = F.affine_grid(self.identity + change, list(image.shape), align_corners=False)
        return F.grid_sample(image, grid.to(image.dtype), padding_mode="border", align_corners=False)

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        label: Tensor | None = None,
        augment_label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W) and noise_label (B,) -> (B, C, H, W). A vector of NaN, or None, is no style. Raises
        ConfigError for labels, and without a content image."""
        layers.refuse_labels(label, 0, augment_label, 0)
        if image is None or image.shape != x.shape:
            found = None if image is None else tuple(image.shape)
            raise ConfigError(
                f"A content image of shape {found} for images of {tuple(x.shape)}: give the same shape."
            )
        code = x.new_zeros(len(x), self.vector_dim) if vector is None else vector.nan_to_num().to(x.dtype)
        image = self.blurred(image.nan_to_num().to(x.dtype))
        contents = torch.stack([image, self.warped(image, code)], 1)
        told = torch.cat([self.noise(100 * noise_label).to(x.dtype), code], 1)
        emb = F.silu(self.emb(F.silu(self.hidden(told))))
        patches = F.pixel_unshuffle(torch.cat([x, contents.flatten(1, 2)], 1), self.patch_size)
        skip = self.first(self.stem(patches), emb)
        h = self.down(skip)
        for block in self.blocks:
            h = block(h, emb)
        h = self.last(torch.cat([F.pixel_shuffle(self.up(h), 2), skip], 1), emb)
        out = F.pixel_shuffle(self.head(h), self.patch_size)
        return out + torch.einsum("bn,bnchw->bchw", self.copied(emb), contents)


class _Block(nn.Module):
    """x + f(x, emb) with a scaled and shifted norm, then attention."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, attention: bool = False):
        super().__init__()
        self.norm0, self.conv0 = layers.group_norm(c_in, smallest=16), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm1, self.affine = (
            layers.group_norm(c_out, smallest=16),
            layers.zeroed(nn.Linear(c_emb, 2 * c_out)),
        )
        self.conv1 = layers.zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = nn.Identity()
        if attention:
            self.attention = layers.Attention(c_out, layers.group_norm(c_out, smallest=16), heads=4)
            layers.zeroed(self.attention.proj)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(torch.addcmul(shift, self.norm1(h), scale + 1)))
        return self.attention(self.skip(x) + h)


def _gaussian(std: float, channels: int) -> Tensor:
    """A filter (channels, 1, n, n) of sum 1 that ends three standard deviations from its middle."""
    x = torch.arange(-math.ceil(3 * std), math.ceil(3 * std) + 1)
    row = (-(x**2) / (2 * std**2 or 1.0)).exp()
    return (torch.outer(row, row) / row.sum().square()).expand(channels, 1, -1, -1).clone()


def _halvings(channels: int, width: int) -> list[nn.Module]:
    """(B, C, H, W) -> (B, 4 width, H / 8, W / 8)."""
    first = [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, 3, padding=1), nn.SiLU()]
    widths = itertools.pairwise([width, 2 * width, 4 * width])
    return first + [part for a, b in widths for part in (nn.Conv2d(a, b, 4, 2, 1), nn.SiLU())]
