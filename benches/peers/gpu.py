#!/usr/bin/env python3
"""What PyTorch and the libraries beneath it reach on one GPU at our shapes: ceilings, and peers of our ops and step.

    benches/peers/gpu.py [OUT.csv]      all sections
    benches/peers/gpu.py --smoke        tiny, on any device: does it run, and do the variants agree

Prints lines of section,name,ms,rate,unit,share; `share` is of the ceiling measured in this run (copy or matmul).
Medians of single runs between two events, on random data in tensors larger than the L2 cache. Each section has its own
seconds and stops between two measurements when they are over; what was left out is said on stderr. Exit code 1:
variants disagree, or a section failed.
"""

import argparse
import csv
import functools
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

# Beside this file in the kit.
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "peers"))

import torch
import torch.nn.functional as F
from mae_step import MEAN, SIZES, STD, Trainer, low_pass, low_pass_filter, patches
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16, F32 = torch.bfloat16, torch.float32
VIT_B = SIZES["vit_b"]
VIT_L = replace(VIT_B, width=1024, depth=24, heads=16)


class OutOfTime(Exception):
    pass


class Bench:
    """Measures, and writes lines."""

    def __init__(self, out, device, smoke):
        self.device, self.smoke = device, smoke
        self.table = csv.writer(out, lineterminator="\n")
        self.out, self.section, self.until = out, "", math.inf
        self.peak, self.failures = {}, []
        self.table.writerow(("section", "name", "ms", "rate", "unit", "share"))

    def pick(self, size, tiny):
        return tiny if self.smoke else size

    def random(self, *shape, dtype=BF16):
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def ms(self, run, repeats=10):
        """Median milliseconds of a run."""
        if time.monotonic() > self.until:
            raise OutOfTime
        warm_up, repeats = self.pick((3, repeats), (1, 1))
        for _ in range(warm_up):
            run()
        self.synchronize()
        times = []
        for _ in range(repeats):
            if self.device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                begin = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)

    def line(self, name, ms, amount, unit, ceiling=None):
        """`amount` is bytes for GB/s, operations for TFLOP/s, images for images/s."""
        rate = amount / ms / {"GB/s": 1e6, "TFLOP/s": 1e9, "images/s": 1e-3}[unit]
        if self.section == "ceiling":
            self.peak[name] = rate
        share = f"{rate / self.peak[ceiling]:.3f}" if ceiling in self.peak else ""
        self.table.writerow((self.section, name, f"{ms:.4f}", f"{rate:.4g}", unit, share))
        self.out.flush()

    def compare(self, name, got, want, tolerance):
        """Two variants of one result must agree, in relative norm; NaN does not."""
        got, want = got.detach().double(), want.detach().double()
        error = ((got - want).norm() / want.norm()).item()
        if not error <= tolerance:
            self.failures.append(f"{self.section} {name}: off by {error:.1e}, more than {tolerance:.0e}")

    def run(self, section, seconds):
        self.section, self.until = section.__name__, time.monotonic() + seconds
        try:
            section(self)
        except OutOfTime:
            print(f"gpu.py: {self.section}: {seconds:.0f} s are over, the rest is left out", file=sys.stderr)
        except Exception as error:  # The sections after this one can still be measured.
            self.failures.append(f"{self.section}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        if self.device == "cuda":
            torch.cuda.empty_cache()


def ceiling(bench):
    size = bench.pick(2 << 30, 1 << 20)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
    copy = torch.empty_like(source)
    bench.line("copy", bench.ms(lambda: copy.copy_(source)), 2 * size, "GB/s")
    side = bench.pick(8192, 64)
    a, b = bench.random(side, side), bench.random(side, side)
    bench.line("matmul", bench.ms(lambda: a @ b), 2 * side**3, "TFLOP/s")


def linear(bench):
    """Each product of a block: forward, gradients of input and weight; then all, as often as a step has them."""
    images = bench.pick(1024, 2)
    operations = milliseconds = 0
    for stack, tokens, width, depth in (("encoder", 50, 768, 12), ("decoder", 197, 512, 8)):
        rows = images * tokens
        for layer, outputs, inputs in (
            ("qkv", 3 * width, width), ("proj", width, width), ("fc1", 4 * width, width), ("fc2", width, 4 * width),
        ):
            x, weight, grad = bench.random(rows, inputs), bench.random(outputs, inputs), bench.random(rows, outputs)
            for what, run in (
                ("forward", lambda: F.linear(x, weight)),
                ("grad_input", lambda: grad @ weight),
                ("grad_weight", lambda: grad.t() @ x),
            ):
                ms, work = bench.ms(run, 7), 2 * rows * outputs * inputs
                bench.line(f"{stack} {layer} {what} {rows}x{outputs}x{inputs}", ms, work, "TFLOP/s", "matmul")
                operations, milliseconds = operations + depth * work, milliseconds + depth * ms
    bench.line("all blocks of a ViT-B step", milliseconds, operations, "TFLOP/s", "matmul")


def attention(bench):
    """PyTorch's attention, forced to each of its backends; useful operations, whatever a kernel pads."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if bench.device == "cpu":
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    for tokens, width, heads in ((50, 64, 12), (197, 32, 16), (197, 64, 12)):
        images = bench.pick(1024, 2)
        # As the layer before leaves them, and the layer after wants them.
        qkv = bench.random(images, tokens, 3, heads, width)
        q, k, v = (part.requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4).unbind(0))
        grad = bench.random(images, tokens, heads, width).transpose(1, 2)
        one = [part[:1].detach().double() for part in (q, k, v)]
        want = (one[0] @ one[1].transpose(-1, -2) / math.sqrt(width)).softmax(-1) @ one[2]
        work, size = 4 * images * heads * tokens**2 * width, images * tokens * heads * width * 2
        for backend in backends:
            name = f"{tokens}x{width} {heads} heads {backend.name.removesuffix('_ATTENTION').lower()}"
            try:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(q, k, v)
                    with torch.no_grad():
                        forward = bench.ms(lambda: F.scaled_dot_product_attention(q, k, v))
                    backward = bench.ms(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
            except RuntimeError as error:
                # Not every backend takes every shape on every GPU.
                print(f"gpu.py: attention {name}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
                continue
            bench.compare(name, out[:1], want, 2e-2)
            bench.line(f"{name} forward", forward, work, "TFLOP/s", "matmul")
            bench.line(f"{name} forward", forward, 4 * size, "GB/s", "copy")
            bench.line(f"{name} backward", backward, 2.5 * work, "TFLOP/s", "matmul")
            bench.line(f"{name} backward", backward, 8 * size, "GB/s", "copy")


def variants(bench, run):
    """A function as it is, and compiled."""
    yield "eager", run
    if bench.device == "cuda":
        yield "compiled", torch.compile(run, dynamic=False)


def layer_norm(bench):
    for stack, rows, width in (("encoder", 50, 768), ("decoder", 197, 512)):
        rows *= bench.pick(1024, 2)
        x, grad = bench.random(rows, width).requires_grad_(), bench.random(rows, width)
        weight, bias = (bench.random(width).requires_grad_() for _ in range(2))
        want = None
        for name, run in variants(bench, lambda x: F.layer_norm(x, (width,), weight, bias, 1e-6)):
            out = run(x)
            with torch.no_grad():
                ms = bench.ms(lambda: run(x))
            bench.line(f"{stack} forward {name}", ms, 2 * 2 * x.numel(), "GB/s", "copy")
            ms = bench.ms(lambda: torch.autograd.grad(out, (x, weight, bias), grad, retain_graph=True))
            bench.line(f"{stack} backward {name}", ms, 3 * 2 * x.numel(), "GB/s", "copy")
            want = out if want is None else want
            bench.compare(f"{stack} {name}", out, want, 1e-2)


def adamw(bench):
    """111.7 million parameters, as ViT-B with its decoder has; read and written: weight, moments; read: gradient."""
    sizes = [bench.pick(111_655_680 // 16, 64)] * 16
    parameters = [torch.nn.Parameter(bench.random(size, dtype=F32)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    options = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
    for name in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(parameters, **{name: True}, **options)
        bench.line(f"update {name}", bench.ms(optimizer.step), 28 * sum(sizes), "GB/s", "copy")
    bench.line("grad_norm", bench.ms(lambda: torch.nn.utils.get_total_norm([p.grad for p in parameters])),
               4 * sum(sizes), "GB/s", "copy")


def low_pass_tables(side, radius, device):
    """The filter as matrices: rows to and from the frequencies that are kept, and which pairs of them are."""
    keep = low_pass_filter(side, radius)
    kept = keep.any(0).nonzero().flatten()
    angle = 2 * math.pi * ((torch.arange(side)[:, None] * kept) % side).double() / side
    forth = torch.complex(angle.cos(), -angle.sin())
    return [t.to(device) for t in (forth.to(torch.complex64), keep[kept][:, kept])]


def low_pass_by_products(images, forth, keep):
    """As mae_step.low_pass, over the few frequencies that are kept."""
    back = forth.conj() / forth.shape[0]
    spectrum = forth.t() @ (images.to(forth.dtype) @ forth)
    return (back @ (spectrum * keep) @ back.t()).abs()


def low_freq_target(bench):
    """Images on [0, 1] to the filtered, normalised patches of a step."""
    size = bench.pick(VIT_B, SIZES["small64"])
    count = bench.pick(1024, 2)
    images = torch.rand(count, 3, size.image, size.image, device=bench.device)
    mean, std = (torch.tensor(value, device=bench.device).view(3, 1, 1) for value in (MEAN, STD))
    keep = low_pass_filter(size.image, size.radius).to(bench.device)
    forth, pairs = low_pass_tables(size.image, size.radius, bench.device)
    filters = {"fft": lambda x: low_pass(x, keep), "products": lambda x: low_pass_by_products(x, forth, pairs)}
    bench.compare("products", filters["products"](images[:2]), filters["fft"](images[:2]), 1e-4)
    part = bench.pick(256, 2)  # The complex spectra of more images at once would take tens of GB.

    def target(run):
        return [patches((run(images[i : i + part]) - mean) / std, size.patch, "rwc") for i in range(0, count, part)]

    for name, run in filters.items():
        bench.line(name, bench.ms(lambda: target(run), 5), count, "images/s")


def loss(bench):
    """Normalised target patches, and the loss with its gradient."""
    shape = (bench.pick(1024, 2), 147, 768)
    prediction, target = bench.random(*shape).requires_grad_(), bench.random(*shape, dtype=F32)

    def forward(prediction, target):
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        return F.mse_loss(prediction.float(), (target - mean) / (variance + 1e-6).sqrt())

    want = None
    for name, run in variants(bench, forward):
        grad = torch.autograd.grad(run(prediction, target), prediction)[0]
        want = grad if want is None else want
        bench.compare(name, grad, want, 1e-2)
        ms = bench.ms(lambda: torch.autograd.grad(run(prediction, target), prediction))
        bench.line(f"forward and backward {name}", ms, (2 + 4 + 2) * target.numel(), "GB/s", "copy")


def step(bench, name, size, images, mode):
    """The whole step of scripts/peers/mae_step.py in bf16, from uint8 images on the GPU to updated weights."""
    if bench.smoke:
        size, images = replace(SIZES["small64"], depth=1, decoder_depth=1), 2
    torch.manual_seed(0)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    compile_mode = None if mode in ("eager", "compile") else mode
    trainer = Trainer(size, 1.5e-4, "bf16", mode != "eager", bench.device, compile_mode)
    shape = (images, 3, size.image, size.image)
    pool = [torch.randint(0, 256, shape, dtype=torch.uint8, device=bench.device) for _ in range(4)]
    losses = []

    def one():
        losses.append(trainer.step(pool[len(losses) % len(pool)]))

    try:
        ms = bench.ms(one, 7)
    except torch.OutOfMemoryError:
        ms = None
    if ms is None:  # Not above: the exception holds on to the step's tensors.
        print(f"gpu.py: step {name} {mode}: {images} images do not fit, half of them next", file=sys.stderr)
        del trainer, pool
        torch.cuda.empty_cache()
        return step(bench, name, size, images // 2, mode)
    if not losses[-1] < losses[0]:
        bench.failures.append(f"step {name} {mode}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    memory = torch.cuda.max_memory_allocated() / 2**30 if bench.device == "cuda" else 0
    bench.line(f"{name} {mode} micro-batch {images} ({memory:.0f} GiB)", ms, images, "images/s")


def section(name, run, *arguments):
    """A section of another name, with arguments."""
    named = functools.partial(run, **dict(zip(("name", "size", "images", "mode"), arguments)))
    named.__name__ = name
    return named


def sections(micro_batch):
    """Each with its seconds: the most telling first. The first step of a compiled network takes up to two minutes."""
    yield ceiling, 15
    yield section("step", step, "vit_b", VIT_B, micro_batch, "eager"), 40
    yield section("step", step, "vit_b", VIT_B, micro_batch, "compile"), 120
    yield linear, 30
    yield attention, 30
    yield low_freq_target, 20
    yield layer_norm, 30
    yield loss, 20
    yield adamw, 15
    yield section("step", step, "vit_b", VIT_B, micro_batch, "max-autotune-no-cudagraphs"), 240
    yield section("step", step, "vit_l", VIT_L, micro_batch // 2, "compile"), 180


def main():
    title, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=title, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", metavar="OUT.csv", help="where lines go (default: stdout)")
    parser.add_argument("--seconds", type=float, default=520, help="in all (default 520): later sections are left out")
    fewer = "images of a step, fewer where they do not fit (default 1024)"
    parser.add_argument("--micro-batch", type=int, default=1024, help=fewer)
    parser.add_argument("--smoke", action="store_true", help="tiny, on any device")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("gpu.py: PyTorch sees no GPU; --smoke runs tiny sizes without one")
    torch.backends.cuda.matmul.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"gpu.py: PyTorch {torch.__version__} on {name}", file=sys.stderr)
    end = time.monotonic() + args.seconds
    with open(args.out, "w", newline="") if args.out else sys.stdout as out:
        bench = Bench(out, device, args.smoke)
        for run, seconds in sections(args.micro_batch):
            if (seconds := min(seconds, end - time.monotonic())) > 1:
                bench.run(run, seconds)
            else:
                print(f"gpu.py: {run.__name__}: left out, {args.seconds:.0f} s are over", file=sys.stderr)
    for failure in bench.failures:
        print(f"gpu.py: {failure}", file=sys.stderr)
    sys.exit(1 if bench.failures else 0)


main()
