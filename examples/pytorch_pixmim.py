#!/usr/bin/env python3
"""Trains a small ViTMAE of Hugging Face's on the bundled photos, with PyTorch's code and with ours, and compares them.

    cargo build --release -p pixmim-capi
    $(scripts/get-torch) examples/pytorch_pixmim.py            under two minutes on two cores

Both start from the same weights and see the same photos and masks. First both learn MAE's target, which PyTorch's code
knows: their losses must agree. Then ours learns PixMIM's target, the low-pass filtered photos. That takes one line,
`pixmim.patch_vit_mae(model)`; the loop is what it was.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))  # or: pip install python/

import numpy  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from transformers import ViTMAEConfig, ViTMAEForPreTraining  # noqa: E402

import pixmim  # noqa: E402

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
# Of the losses of a step, as a share: f32 rounding, which steps of an optimizer amplify.
MOST_APART = 1e-4


def photos(size: int) -> torch.Tensor:
    """The bundled photos, cropped to squares and normalised: (64, 3, size, size)."""
    files = sorted((ROOT / "examples" / "photos").glob("*/*.jpg"))
    squares = [ImageOps.fit(Image.open(file).convert("RGB"), (size, size), Image.Resampling.BICUBIC) for file in files]
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(square) for square in squares])).float() / 255
    return ((pixels - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def train(
    model: torch.nn.Module, images: torch.Tensor, steps: int, batch: int, device: str
) -> Iterator[tuple[float, float]]:
    """Takes a step each time it is asked: its loss and seconds. Photos and masks depend on the step's number alone."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.05)
    # Without it the first steps multiply rounding errors, and any two programs part.
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    patches = (model.config.image_size // model.config.patch_size) ** 2
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        chosen = torch.randperm(len(images), generator=draw)[:batch]
        noise = torch.rand(batch, patches, generator=draw).to(device)
        inputs = images[chosen].to(device)
        start = time.perf_counter()
        loss = model(inputs, noise=noise).loss
        loss.backward()
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
        yield loss.item(), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side, a multiple of 8 (default 64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    images = photos(args.size)
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=args.size, patch_size=8, hidden_size=192, num_hidden_layers=6, num_attention_heads=3,
        intermediate_size=768, decoder_hidden_size=96, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
        decoder_intermediate_size=384, norm_pix_loss=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    start = ViTMAEForPreTraining(config)
    networks = {
        "MAE, PyTorch": copy.deepcopy(start),
        "MAE, ours": pixmim.patch_vit_mae(copy.deepcopy(start), radius=None),
        "PixMIM, ours": pixmim.patch_vit_mae(copy.deepcopy(start)),
    }
    print(f"{len(images)} photos of {args.size} x {args.size}, batches of {args.batch}, on {args.device}", flush=True)
    # A step of each in turn, so that whatever else the machine does slows all of them.
    runs = [train(model, images, args.steps, args.batch, args.device) for model in networks.values()]
    steps = zip(*zip(*runs, strict=True), strict=True)
    print(f"{'':<14}{'ms/step':>9}{'first loss':>12}{'last loss':>12}")
    losses = {}
    for name, results in zip(networks, steps, strict=True):
        losses[name], seconds = zip(*results, strict=True)
        median = 1e3 * statistics.median(seconds)
        print(f"{name:<14}{median:>9.1f}{losses[name][0]:>12.5f}{losses[name][-1]:>12.5f}")
    pairs = zip(losses["MAE, PyTorch"], losses["MAE, ours"], strict=True)
    apart = max(abs(ours / theirs - 1) for theirs, ours in pairs)
    print(f"losses of MAE, ours and PyTorch's: at most {100 * apart:.4f} % apart in {args.steps} steps")
    if not apart <= MOST_APART:
        sys.exit(f"that is more than {100 * MOST_APART} %: something is wrong")


if __name__ == "__main__":
    main()
