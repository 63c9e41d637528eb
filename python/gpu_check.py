#!/usr/bin/env python3
"""Checks the package on a GPU, with nothing but PyTorch: `gpu_check.py [--device cuda:0] [--speed] [WORD ..]`.

Runs what `tests/checks.py` has for every device, and what only a GPU can show: streams, CUDA graphs, that nothing
waits for the GPU, full sizes in bf16, `torch.compile` with its own code generator. With words, only checks whose names
have one of them. `--speed` then times a ViT-B/16 MAE with and without us.

Takes from the repository `python/` and `scripts/peers/mae_step.py`, in these places, and a libpixmim with GPU kernels:
beside `python/pixmim/*.py`, or where PIXMIM_LIBRARY says. Prints a line for each check. Exit codes: 0 all passed, 1
something failed, 2 no GPU.
"""

import argparse
import copy
import statistics
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

import checks  # noqa: E402
import reference  # noqa: E402
import torch  # noqa: E402
from checks import TOLERANCES, expect_close, expect_same_as, randn, shuffled_ids, small_mae  # noqa: E402

import pixmim  # noqa: E402

GPU_CHECKS = []


def gpu_check(function):
    GPU_CHECKS.append(function)
    return function


@gpu_check
def work_is_ordered_by_the_current_stream(device):
    stream = torch.cuda.Stream(device)
    inp, weight = randn(device, 1 << 14, 768, dtype=torch.float32), torch.ones(768, device=device)
    wanted = pixmim.layer_norm(inp, weight, weight)
    late = torch.zeros_like(inp)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        # Whoever does not wait for this reads zeros.
        torch.cuda._sleep(100_000_000)
        late.copy_(inp)
        found = pixmim.layer_norm(late, weight, weight)
    assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert torch.equal(found, wanted)


@gpu_check
def a_step_never_waits_for_the_gpu(device):
    model, images = small_mae(device)
    pixmim.patch_vit_mae(model)
    checks.step(model, images)
    model.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(images)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_check
def a_step_is_captured_and_replayed(device):
    model, images = small_mae(device)
    pixmim.patch_vit_mae(model, masking=False)
    model.noise = torch.rand(3, 16, device=device)
    batches = [(images, model.noise.clone()), (images.flip(0) * 0.7, model.noise.flip(1))]
    still_images = images.clone()
    warm_up = torch.cuda.Stream(device)
    warm_up.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(still_images)[0].backward()
    torch.cuda.current_stream(device).wait_stream(warm_up)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(still_images)[0]
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for images, noise in batches:
        still_images.copy_(images)
        model.noise.copy_(noise)
        graph.replay()
        found = loss.detach().clone(), {name: grad.clone() for name, grad in grads.items()}
        eager = copy.deepcopy(model)
        eager.zero_grad(set_to_none=True)
        eager.noise = noise
        wanted = eager(images)[0]
        wanted.backward()
        expect_close(found[0], wanted.detach(), 1e-6, "loss")
        for name, parameter in eager.named_parameters():
            expect_close(found[1][name], parameter.grad, 1e-5, name)


@gpu_check
def replays_draw_new_masks(device):
    samples = torch.zeros(4, dtype=torch.int64, device=device)
    epoch = torch.zeros(1, dtype=torch.int64, device=device)
    pixmim.random_masking(samples, 196, epoch=epoch)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        samples.copy_(torch.randint(2**62, (4,), device=device))
        _, _, restore = pixmim.random_masking(samples, 196, epoch=epoch)
    seen = set()
    for _ in range(5):
        graph.replay()
        for row in restore.cpu().tolist():
            assert sorted(row) == list(range(196))
            seen.add(tuple(row))
    assert len(seen) == 20


@gpu_check
def full_sizes_in_bf16_are_as_good_as_pytorchs(device):
    for b, t, heads, head_dim in [(8, 50, 12, 64), (8, 197, 16, 32), (2, 785, 12, 64)]:
        qkv = randn(device, b, t, 3 * heads * head_dim, dtype=torch.bfloat16)
        expect_same_as(
            lambda x, h=heads: reference.attention(x, h),
            lambda x, h=heads: pixmim.attention(x, h),
            [qkv],
            TOLERANCES[torch.bfloat16],
            f"{b, t, heads, head_dim}",
        )
    for width in (512, 768):
        inputs = [randn(device, *shape, dtype=torch.bfloat16) for shape in ((8, 197, width), (width,), (width,))]
        expect_same_as(
            lambda *x: reference.layer_norm(*x, 1e-6),
            lambda *x: pixmim.layer_norm(*x, 1e-6),
            inputs,
            2 * TOLERANCES[torch.bfloat16],
            f"{width}",
        )


@gpu_check
def the_filter_at_its_published_size_is_right_in_both_precisions(device):
    for size, radius in [(224, 40), (448, 80)]:
        pixels = (255 * reference.uniform("pixels", (1, 3, size, size))).byte().to(device)
        ids = shuffled_ids(device, 1, (size // 16) ** 2, (size // 16) ** 2 // 4 * 3)
        wanted = reference.low_freq_target(pixels.double() / 255, ids, 16, radius)
        # Of a patch of unit variance 1e-3; white noise, filtered, has a third of that at most.
        for exact, allowed in [(True, 1e-5), (False, 2e-3)]:
            found = pixmim.low_freq_target(pixels, ids, 16, radius, normalized=False, exact=exact)
            error = (found - wanted).square().mean().sqrt().item()
            assert error <= allowed, f"{size}, exact {exact}: {error:.1e} rms, allowed {allowed:.1e}"


@gpu_check
def memory_does_not_grow(device):
    model, images = small_mae(device)
    pixmim.patch_vit_mae(model)
    taken = []
    for _ in range(6):
        checks.step(model, images)
        torch.cuda.synchronize(device)
        taken.append(torch.cuda.memory_reserved(device))
    assert taken[2] == taken[-1], taken


@gpu_check
def a_patched_mae_compiles_with_pytorchs_code_generator(device):
    model, images = small_mae(device)
    pixmim.patch_vit_mae(model, masking=False)
    # Its random numbers are not eager's.
    model.noise = torch.rand(3, 16, device=device)
    wanted = checks.step(model, images)
    compiled = torch.compile(model, fullgraph=True)
    compiled.zero_grad()
    loss, pred, mask = compiled(images)
    loss.backward()
    found = loss.detach(), pred.detach(), mask, {name: p.grad for name, p in model.named_parameters()}
    checks.expect_same_step(found, wanted, 1e-5)


def speed(device):
    """Medians of ViT-B/16 MAE steps of 64 images under bf16 autocast, in turn."""
    size = reference.mae_step.Size(224, 16, 768, 12, 12, 512, 8, 16, 64, None)
    images = torch.randn(64, 3, 224, 224, device=device)
    networks = {"mae, pytorch": reference.Mae(size).to(device)}
    networks["mae, ours"] = pixmim.patch_vit_mae(copy.deepcopy(networks["mae, pytorch"]), None)
    networks["pixmim, ours"] = pixmim.patch_vit_mae(copy.deepcopy(networks["mae, pytorch"]))
    times = {name: [] for name in networks}
    for turn in range(8):
        for name, model in networks.items():
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(10):
                model.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(images)[0]
                loss.backward()
            torch.cuda.synchronize(device)
            if turn > 1:
                times[name].append((time.perf_counter() - start) / 10)
    for name, seconds in times.items():
        print(f"speed  {name:<14} {statistics.median(seconds) * 1e3:8.2f} ms a step of 64 images", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N; cpu for a test of this program")
    parser.add_argument("--speed", action="store_true", help="time steps too")
    parser.add_argument("words", nargs="*", help="only checks whose names have one of these words")
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        print("no GPU that PyTorch can use")
        sys.exit(2)
    if on_gpu:
        torch.cuda.set_device(args.device)
        print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    chosen = checks.CHECKS + GPU_CHECKS * on_gpu
    chosen = [c for c in chosen if not args.words or any(word in c.__name__ for word in args.words)]
    failed = 0
    for function in chosen:
        start = time.perf_counter()
        try:
            function("cuda" if on_gpu else "cpu")
            result = "ok"
        except Exception:
            traceback.print_exc()
            failed, result = failed + 1, "FAILED"
        print(f"{result:<7}{function.__name__} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} checks passed")
    if args.speed and on_gpu:
        speed("cuda")
    sys.exit(1 if failed or not chosen else 0)


if __name__ == "__main__":
    main()
