#!/usr/bin/env python3
"""What PyTorch and the libraries beneath it reach on one GPU at our shapes: peers of our ops and of the whole step.

    benches/peers/gpu.py [OUT.csv]      all sections
    benches/peers/gpu.py --smoke        tiny, on any device: does it run, and do the variants agree
    benches/peers/gpu.py --only step    sections whose names have this

Rows have the names of our own records (op, direction, shape), and a variant: what PyTorch was told to do. A variant is
compared first, and not timed if its results are wrong. Times are medians of single runs with their quartiles, the L2
cache flushed before each, on random data; `share` is of the nearer of the peaks measured in this run, copy or product.
Clock and power are those during a section's first row. Each section has its own seconds and stops between two
measurements when they are over; what was left out is said on stderr. Exit code 1: a variant was wrong, or a section
failed.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

# Beside this file in the kit.
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "peers"))

import ops
import torch
from measure import Bench
from step import Variant, method, step

EAGER, COMPILED = Variant("eager"), Variant("compile", compile=True)
AUTOTUNED = Variant("max-autotune-no-cudagraphs", compile=True, mode="max-autotune-no-cudagraphs")
EXPERT = Variant("compile, bf16 parameters, target by products", compile=True, pure=True, products=True)


def sections(micro_batch):
    """Each with its seconds, the most telling first. The first step of a compiled network takes up to two minutes."""
    wanted = {}

    def of(network, variant, share=1):
        run = functools.partial(step, network=network, variant=variant, batch=4096,
                                micro_batch=max(1, micro_batch // share), wanted=wanted)
        run.__name__ = f"step {network} {variant.name}"
        return run

    yield method, 20
    yield ops.peak, 15
    yield of("vit_b", EAGER), 40
    yield ops.attention, 40
    yield ops.low_freq_target, 20
    yield ops.adamw, 15
    yield ops.layer_norm, 30
    yield ops.masked_mse_loss, 20
    yield ops.input, 20
    yield of("vit_b", COMPILED), 120
    yield ops.linear, 90
    yield of("vit_b", Variant("eager, CUDA graph", graph=True)), 40
    yield of("vit_b", EXPERT), 120
    for backend in ("cudnn", "flash", "efficient"):
        yield of("vit_b", Variant(f"compile, {backend} attention", compile=True, backend=backend)), 120
    yield of("vit_b", AUTOTUNED), 240
    for network, share in (("vit_l", 2), ("vit_h", 4)):
        yield of(network, EAGER, share), 60
        yield of(network, COMPILED, share), 180


def main():
    title, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=title, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", metavar="OUT.csv", help="where rows go (default: stdout)")
    parser.add_argument("--seconds", type=float, default=520, help="in all (default 520): later sections are left out")
    fewer = "images at a time of ViT-B's step, fewer where they do not fit (default 1024)"
    parser.add_argument("--micro-batch", type=int, default=1024, help=fewer)
    parser.add_argument("--only", default="", help="sections whose names have this")
    parser.add_argument("--smoke", action="store_true", help="tiny, on any device")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("gpu.py: PyTorch sees no GPU; --smoke runs tiny sizes without one")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    end = time.monotonic() + args.seconds
    with open(args.out, "w", newline="") if args.out else sys.stdout as out:
        out.write(f"# device: {name}\n# pytorch: {torch.__version__}, CUDA {torch.version.cuda}\n")
        bench = Bench(out, device, args.smoke, end)
        for run, seconds in sections(args.micro_batch):
            # Shares are of the peaks.
            if args.only not in run.__name__ and run is not ops.peak:
                continue
            if (seconds := min(seconds, end - time.monotonic())) > 1:
                bench.run(run, seconds)
            else:
                print(f"gpu.py: {run.__name__}: left out, {args.seconds:.0f} s are over", file=sys.stderr)
    for failure in bench.failures:
        print(f"gpu.py: {failure}", file=sys.stderr)
    sys.exit(1 if bench.failures else 0)


main()
