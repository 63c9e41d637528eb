"""What the ops are compared with: the same in plain PyTorch, in the dtype of its inputs."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts" / "peers"))

import mae_step
from mae_step import MEAN, STD, low_pass, low_pass_filter, patches, uniform  # noqa: F401


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    b, t, width = qkv.shape
    q, k, v = qkv.view(b, t, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, t, width // 3)


def layer_norm(inp: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(inp, inp.shape[-1:], weight, bias, eps)


def masked_mse_loss(pred: Tensor, target: Tensor, norm_pix: bool) -> Tensor:
    if norm_pix:
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return F.mse_loss(pred, target)


def low_freq_target(pixels: Tensor, ids_masked: Tensor, patch_size: int, radius: float, mean=MEAN, std=STD) -> Tensor:
    """Of pixels on [0, 1]."""
    mean, std = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1) for v in (mean, std))
    keep = low_pass_filter(pixels.shape[-1], radius).to(pixels.device)
    all_patches = patches((low_pass(pixels, keep) - mean) / std, patch_size, "rwc")
    row = torch.arange(len(pixels), device=pixels.device)[:, None]
    return all_patches[row, ids_masked.long()]


class Mae(mae_step.Mae):
    """MAE with the methods of its own source. `noise` decides the masks while it is set."""

    noise: Tensor | None = None

    def __init__(self, size: mae_step.Size):
        super().__init__(size)
        self.norm_pix_loss = size.norm_pix
        for module in self.modules():
            if isinstance(module, mae_step.Attention):
                module.num_heads = module.heads

    def patchify(self, imgs):
        return patches(imgs, self.size.patch, "rwc")

    def random_masking(self, x, mask_ratio):
        n, tokens, width = x.shape
        kept = int(tokens * (1 - mask_ratio))
        noise = torch.rand(n, tokens, device=x.device) if self.noise is None else self.noise
        ids_shuffle = noise.argsort(1)
        ids_restore = ids_shuffle.argsort(1)
        mask = (ids_restore >= kept).to(x.dtype)
        return x.gather(1, ids_shuffle[:, :kept, None].expand(-1, -1, width)), mask, ids_restore

    def forward_encoder(self, imgs, mask_ratio):
        x = self.patch_embed(patches(imgs, self.size.patch, "crw")) + self.position[1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x)), mask, ids_restore

    def forward_decoder(self, x, ids_restore):
        x = self.decoder_embed(x)
        gone = ids_restore.shape[1] + 1 - x.shape[1]
        rows = torch.cat([x[:, 1:], self.mask_token.expand(len(x), gone, -1).to(x.dtype)], 1)
        rows = rows.gather(1, ids_restore[..., None].expand(-1, -1, rows.shape[-1]))
        x = torch.cat([x[:, :1], rows], 1) + self.decoder_position
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def forward_loss(self, imgs, pred, mask):
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


SMALL = mae_step.Size(32, 8, 48, 2, 3, 32, 1, 2, 3, None)
TINY = mae_step.Size(8, 2, 16, 2, 4, 8, 1, 2, 2, None)


def golden_mae() -> Mae:
    """The tiny network in f64 whose losses and gradients several implementations agree on."""
    with torch.no_grad():
        model = Mae(TINY).double()
        # The tables of positions, made in f32, again in f64.
        model.position = mae_step.position_table(TINY.width, TINY.grid)
        model.decoder_position = mae_step.position_table(TINY.decoder_width, TINY.grid)
        for name, parameter in model.named_parameters():
            value = 0.5 * (2 * uniform(name, parameter.shape) - 1)
            parameter.copy_(1 + 0.5 * value if "norm" in name and name.endswith("weight") else value)
    model.noise = uniform("noise", (2, 16))
    return model
