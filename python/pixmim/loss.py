"""PixMIM's target and loss as modules, for a network that predicts the pixels of masked patches."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .ops import IMAGENET_MEAN, IMAGENET_STD, low_freq_target, masked_mse_loss

# PixMIM's filter: 40 cycles in 224 pixels.
RADIUS_PER_PIXEL = 40 / 224


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) to (B, L, E): patches row by row, their numbers as (row, column, channel)."""
    b, c, h, w = images.shape
    if h % patch_size != 0 or w % patch_size != 0:
        raise ValueError(f"pixmim: images of {h} x {w} have no whole patches of {patch_size} x {patch_size}")
    grid = images.reshape(b, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch_size * patch_size * c)


def gather_patches(patches: Tensor, ids: Tensor) -> Tensor:
    """(B, L, E) and ids (B, M) to (B, M, E)."""
    return patches.gather(1, ids.long().unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


class PixMIMTarget(nn.Module):
    """What PixMIM's network is to predict: the masked patches of the low-pass filtered images.

    Args:
        patch_size: P.
        radius: Of the low-pass filter, in cycles per image; "pixmim": 40 at 224 pixels, and as many cycles per pixel at
            other sizes; None: no filter, which is MAE.
        mean: By which the images are normalised.
        std: By which the images are normalised.

    It has no parameters and no buffers.
    """

    def __init__(
        self,
        patch_size: int = 16,
        radius: float | Literal["pixmim"] | None = "pixmim",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        if isinstance(radius, str) and radius != "pixmim":
            raise ValueError(f'pixmim: radius is {radius!r}; give a number, "pixmim" or None')
        self.patch_size, self.radius = patch_size, radius
        self.mean, self.std = tuple(mean), tuple(std)

    @torch.no_grad()
    def forward(self, images: Tensor, ids_masked: Tensor) -> Tensor:
        """(B, 3, S, S), normalised, and (B, M) to (B, M, E)."""
        if self.radius is None:
            return gather_patches(patchify(images, self.patch_size), ids_masked)
        radius = images.shape[-1] * RADIUS_PER_PIXEL if self.radius == "pixmim" else self.radius
        return low_freq_target(images, ids_masked, self.patch_size, radius, mean=self.mean, std=self.std)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, radius={self.radius!r}"


class PixMIMLoss(nn.Module):
    """PixMIM's loss: mean squared error of the predicted masked patches against `PixMIMTarget`.

    Args:
        patch_size: P.
        radius: As in `PixMIMTarget`.
        norm_pix: Whether each target patch is normalised, after the filter. PixMIM does.
        mean: As in `PixMIMTarget`.
        std: As in `PixMIMTarget`.
    """

    def __init__(
        self,
        patch_size: int = 16,
        radius: float | Literal["pixmim"] | None = "pixmim",
        norm_pix: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        self.target = PixMIMTarget(patch_size, radius, mean, std)
        self.norm_pix = norm_pix

    def forward(self, pred: Tensor, images: Tensor, ids_masked: Tensor) -> Tensor:
        """The loss of predictions of the masked patches (B, M, E), or of all (B, L, E), in `PixMIMTarget`'s order."""
        if pred.shape[1] != ids_masked.shape[1]:
            pred = gather_patches(pred, ids_masked)
        return masked_mse_loss(pred, self.target(images, ids_masked), self.norm_pix)

    def extra_repr(self) -> str:
        return f"norm_pix={self.norm_pix}"
