#!/usr/bin/env python3
"""One PixMIM-on-MAE training step in PyTorch: the peer that scripts/compare-cpu measures on the CPU, and benches/peers/gpu.py
on a GPU.

The step starts from uint8 images in memory and ends with updated weights: normalise, low-pass target,
random masking, encoder on the kept tokens, decoder, norm_pix loss on the masked tokens, backward, AdamW.
Cropping and flipping are left out on both sides.

It is written for speed as a PyTorch user would, with the library's fused attention and optimiser, and it
spares work that MAE's reference code does but that the loss cannot see: only kept patches are embedded, only
masked tokens are predicted, and instead of un-shuffling the decoder's tokens their positions are shuffled
(attention does not know the order). `--check` proves with golden values that this is the same method.
"""

import argparse
import contextlib
import functools
import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Size:
    """Shapes of one model and its batch; `radius` is that of the low-pass target, in cycles per image."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    batch: int
    radius: float | None
    mask_ratio: float = 0.75
    norm_pix: bool = True

    @property
    def grid(self):
        return self.image // self.patch


SIZES = {
    "small64": Size(64, 8, 192, 6, 3, 96, 2, 3, 64, 40 * 64 / 224),
    "vit_b": Size(224, 16, 768, 12, 12, 512, 8, 16, 8, 40),
    "vit_l": Size(224, 16, 1024, 24, 16, 512, 8, 16, 8, 40),
    "vit_h": Size(224, 14, 1280, 32, 16, 512, 8, 16, 8, 40),
}


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def position_table(width, grid):
    """Fixed sine-cosine table (1 + grid^2, width): zeros for the class token, then column half, row half."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    column, row = axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)
    table = torch.cat([column, row], 1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])


def low_pass_filter(side, radius):
    """Binary mask (side, side) for an unshifted spectrum: a disc around (side - 1) / 2 of the shifted one."""
    distance = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) ** 2
    return torch.fft.ifftshift(distance[:, None] + distance[None] <= radius**2)


def low_pass(images, keep):
    """Magnitude of the images after the filter; the magnitude makes the published shifts unnecessary."""
    return torch.fft.ifft2(torch.fft.fft2(images) * keep).abs()


def patches(images, patch, order):
    """(N, 3, H, W) to (N, L, 3 * patch^2); `order` arranges channel (2), row (4) and column (6) in a patch."""
    n, c, h, w = images.shape
    split = images.view(n, c, h // patch, patch, w // patch, patch)
    axes = {"c": 1, "r": 3, "w": 5}
    return split.permute(0, 2, 4, *(axes[a] for a in order)).reshape(n, -1, c * patch * patch)


class PatchEmbed(nn.Module):
    """Holds a convolution's weights, as checkpoints do; with stride = kernel it is a linear map of a patch."""

    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x):
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class Mae(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
        width, decoder_width = size.width, size.decoder_width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.patch_embed = PatchEmbed(size.patch, width)
        self.blocks = nn.Sequential(*(Block(width, size.heads) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_width, size.decoder_heads) for _ in range(size.decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, 3 * size.patch**2)
        dtype = torch.get_default_dtype()
        self.register_buffer("position", position_table(width, size.grid).to(dtype))
        self.register_buffer("decoder_position", position_table(decoder_width, size.grid).to(dtype))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, target, noise):
        """Loss of normalised `images` against normalised `target` (both (N, 3, H, W)); `noise` (N, L) masks."""
        size = self.size
        n, tokens = noise.shape
        kept = int(tokens * (1 - size.mask_ratio))
        shuffle = noise.argsort(1)
        row = torch.arange(n, device=noise.device)[:, None]

        x = patches(images, size.patch, "crw")[row, shuffle[:, :kept]]
        x = self.patch_embed(x) + self.position[1:][shuffle[:, :kept]]
        x = torch.cat([self.cls_token.expand(n, -1, -1), x], 1)
        x = self.norm(self.blocks(x))

        x = self.decoder_embed(x)
        x = torch.cat([x, self.mask_token.expand(n, tokens - kept, -1).to(x.dtype)], 1)
        x = x + self.decoder_position[F.pad(shuffle + 1, (1, 0))]
        x = self.decoder_blocks(x)[:, 1 + kept :]
        prediction = self.decoder_pred(self.decoder_norm(x))

        target = patches(target, size.patch, "rwc")[row, shuffle[:, kept:]]
        if size.norm_pix:
            variance, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return F.mse_loss(prediction.to(target.dtype), target)


def adamw(model, lr):
    """AdamW with MAE's groups: no weight decay for vectors; PyTorch's fastest kernel that runs here."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    options = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8}
    try:
        return torch.optim.AdamW(groups, fused=True, **options)
    except RuntimeError:
        return torch.optim.AdamW(groups, foreach=True, **options)


class Trainer:
    """The step: everything between uint8 images and updated weights. `compile` makes a function of the model: none runs
    it as it is."""

    def __init__(self, size, lr, precision="f32", compile=None, device="cpu"):
        self.device = device
        self.model = Mae(size).to(device)
        self.optimizer = adamw(self.model, lr)
        self.loss = compile(self.model) if compile else self.model
        self.autocast = (
            torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        )
        dtype = torch.get_default_dtype()
        self.mean, self.std = (torch.tensor(v, dtype=dtype, device=device).view(3, 1, 1) for v in (MEAN, STD))
        self.filter = None
        if size.radius is not None:
            self.filter = functools.partial(low_pass, keep=low_pass_filter(size.image, size.radius).to(device))

    def forward(self, images, noise):
        """Loss of images in [0, 1]. The filter runs in full precision, and outside of what is compiled:
        PyTorch's compiler has no code for complex numbers."""
        with torch.no_grad():
            x = (images - self.mean) / self.std
            target = x if self.filter is None else (self.filter(images) - self.mean) / self.std
        with self.autocast:
            return self.loss(x, target, noise)

    def accumulate(self, pixels, noise, share=1.0):
        """Adds the gradients of uint8 images (N, 3, H, W), which are this share of a step's; their share of the loss."""
        loss = share * self.forward(pixels.float().div_(255), noise)
        loss.backward()
        return loss.detach()

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def noise(self, pixels):
        return torch.rand(pixels.shape[0], self.model.size.grid**2, device=self.device)

    def step(self, pixels):
        """One step on uint8 images (N, 3, H, W); returns the loss."""
        loss = self.accumulate(pixels, self.noise(pixels))
        self.update()
        return loss.item()


def peak_rss_mib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(size, mode, steps, warmup):
    form, precision = mode.split("-")
    trainer = Trainer(size, 1.5e-4, precision, torch.compile if form == "compile" else None)
    pool = torch.randint(0, 256, (4, size.batch, 3, size.image, size.image), dtype=torch.uint8)
    times, loss = [], math.nan
    for step in range(warmup + steps):
        start = time.perf_counter()
        loss = trainer.step(pool[step % len(pool)])
        if step >= warmup:
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    print(
        f"images_per_s={size.batch / seconds:.2f} ms_per_step={seconds * 1e3:.2f} "
        f"peak_rss_mib={peak_rss_mib():.0f} loss={loss:.6f} torch={torch.__version__}"
    )


MASK64 = (1 << 64) - 1


def uniform(name, shape):
    """Reproducible numbers in [0, 1): SplitMix64 of (FNV-1a of the name + flat index)."""
    base = 0xCBF29CE484222325
    for byte in name.encode():
        base = ((base ^ byte) * 0x100000001B3) & MASK64
    values = []
    for index in range(math.prod(shape)):
        z = (base + index + 0x9E3779B97F4A7C15) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        values.append(((z ^ (z >> 31)) >> 11) / 2**53)
    return torch.tensor(values, dtype=torch.float64).view(shape)


def tiny_trainer(radius, norm_pix):
    trainer = Trainer(Size(8, 2, 16, 2, 4, 8, 1, 2, 2, radius, norm_pix=norm_pix), 0.01)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            value = 0.5 * (2 * uniform(name, parameter.shape) - 1)
            is_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.5 * value if is_scale else value)
    return trainer


def check():
    """Compares the step in f64 with golden values of a tiny model that three other implementations share."""
    failures = 0

    def expect(what, got, want, tolerance):
        nonlocal failures
        right = abs(got - want) <= tolerance
        failures += not right
        print(f"{'ok' if right else 'WRONG'}: {what} = {got:.12f}, golden {want:.12f}")

    parameters = sum(p.numel() for p in Mae(SIZES["vit_b"]).parameters())
    expect("parameters of vit_b", parameters, 111_655_680, 0)

    torch.set_default_dtype(torch.float64)
    images, noise = uniform("image", (2, 3, 8, 8)), uniform("noise", (2, 16))
    golden = {
        (False, None): 2.420112978034,
        (False, 2): 1.106015768093,
        (True, None): 1.861839455008,
        (True, 2): 1.713184878851,
    }
    for (norm_pix, radius), want in golden.items():
        loss = tiny_trainer(radius, norm_pix).forward(images, noise).item()
        expect(f"loss, norm_pix {norm_pix}, radius {radius}", loss, want, 1e-9)

    trainer = tiny_trainer(2, True)
    golden = (1.7131848789, 1.2154731791, 1.1253087315, 1.0812166931, 1.0346351310)
    for step, want in enumerate(golden):
        loss = trainer.forward(images, noise)
        expect(f"loss before update {step}", loss.item(), want, 1e-9)
        if step == 0:
            gradients = torch.autograd.grad(loss, list(trainer.model.parameters()), retain_graph=True)
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
            expect("gradient norm", norm, 3.544680775385, 1e-9)
        loss.backward()
        trainer.update()
    expect("cls_token[0] after 5 updates", trainer.model.cls_token[0, 0, 0].item(), 0.0251657636, 1e-9)
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small64")
    modes = [f"{form}-{precision}" for form in ("eager", "compile") for precision in ("f32", "bf16")]
    parser.add_argument("--mode", choices=modes, default="eager-f32")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, the first of which compiles")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="compare with golden values instead of measuring")
    args = parser.parse_args()
    for name, least in (("steps", 1), ("warmup", 0), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.check:
        sys.exit(1 if check() else 0)
    measure(SIZES[args.size], args.mode, args.steps, args.warmup)


if __name__ == "__main__":
    main()
