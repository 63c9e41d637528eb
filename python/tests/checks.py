"""What holds on every device: plain functions of a device, which say by their names what they check.

`test_checks.py` runs them under pytest, `gpu_check.py` without it.
"""

import copy
import threading
from collections.abc import Callable

import reference
import torch

import pixmim
from pixmim.loss import gather_patches

CHECKS: list[Callable[[str], None]] = []
# Largest error, as a share of the largest number of the f64 reference.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def check(function):
    CHECKS.append(function)
    return function


def dtypes(device):
    return [torch.float32, torch.float64 if device == "cpu" else torch.bfloat16]


def randn(device, *shape, dtype=torch.float64, seed=0):
    """The same numbers for each device and dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).to(device)


def expect_close(found, wanted, tolerance, what):
    assert found.shape == wanted.shape, f"{what}: {found.shape}, expected {wanted.shape}"
    largest = wanted.double().abs().max().item()
    error = (found.double() - wanted.double()).abs().max().item()
    assert error <= tolerance * largest, f"{what}: off by {error:.2e} of {largest:.2e}, allowed {tolerance:.1e} of it"


def expect_same_as(reference_function, function, inputs, tolerance, what):
    """Values and gradients, against the reference in f64, with a random gradient from above."""
    ours = [x.detach().clone().requires_grad_() for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = function(*ours), reference_function(*theirs)
    expect_close(found, wanted, tolerance, f"{what}: value")
    above = randn(found.device, *found.shape, dtype=found.dtype, seed=9)
    found.backward(above)
    wanted.backward(above.double())
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert x.grad.dtype == x.dtype
        expect_close(x.grad, y.grad, tolerance, f"{what}: gradient of input {i}")


def raises(error, function):
    try:
        function()
    except error as raised:
        return str(raised)
    raise AssertionError(f"{error.__name__} was expected")


def shuffled_ids(device, images, patches, count):
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(patches, generator=generator)[:count] for _ in range(images)]).to(device)


@check
def attention_equals_pytorchs(device):
    for b, t, heads, head_dim in [(2, 5, 3, 8), (3, 50, 2, 16), (1, 197, 3, 24), (2, 130, 1, 64)]:
        for dtype in dtypes(device):
            qkv = randn(device, b, t, 3 * heads * head_dim, dtype=dtype)
            expect_same_as(
                lambda x, heads=heads: reference.attention(x, heads),
                lambda x, heads=heads: pixmim.attention(x, heads),
                [qkv],
                TOLERANCES[dtype],
                f"{b, t, heads, head_dim, dtype}",
            )


@check
def layer_norm_equals_pytorchs(device):
    for shape, eps in [((3, 5, 24), 1e-6), ((131, 64), 1e-5), ((2, 3, 7, 136), 1e-12)]:
        for dtype in dtypes(device):
            inp = 2 * randn(device, *shape, dtype=dtype) + 0.5
            weight, bias = (randn(device, shape[-1], dtype=dtype, seed=seed) for seed in (1, 2))
            expect_same_as(
                lambda *x, eps=eps: reference.layer_norm(*x, eps),
                lambda *x, eps=eps: pixmim.layer_norm(*x, eps),
                [inp, weight, bias],
                2 * TOLERANCES[dtype],
                f"{shape, dtype}",
            )


@check
def masked_mse_loss_equals_pytorchs(device):
    for b, masked, numbers in [(3, 5, 48), (2, 147, 192), (1, 3, 108)]:
        for dtype in dtypes(device):
            for norm_pix in (False, True):
                pred = randn(device, b, masked, numbers, dtype=dtype)
                wide = torch.float32 if dtype == torch.bfloat16 else dtype
                target = 1.5 * randn(device, b, masked, numbers, dtype=wide, seed=1) + 0.3
                expect_same_as(
                    lambda x, n=norm_pix, t=target: reference.masked_mse_loss(x, t.double(), n),
                    lambda x, n=norm_pix, t=target: pixmim.masked_mse_loss(x, t, n),
                    [pred],
                    TOLERANCES[dtype],
                    f"{b, masked, numbers, dtype, norm_pix}",
                )


@check
def low_freq_target_equals_the_fourier_transform(device):
    for size, patch, radius in [(32, 8, 8.0), (24, 4, 5.3), (15, 5, 3.0)]:
        for dtype in [torch.float32] + [torch.float64] * (device == "cpu"):
            pixels = reference.uniform("pixels", (2, 3, size, size)).to(device)
            mean, std = (torch.tensor(v, dtype=torch.float64, device=device).view(3, 1, 1) for v in pixel_statistics())
            images = ((pixels - mean) / std).to(dtype)
            total = (size // patch) ** 2
            ids = shuffled_ids(device, 2, total, total - 2)
            wanted = reference.low_freq_target(pixels, ids, patch, radius)
            tolerance = 4 * TOLERANCES[dtype]
            found = pixmim.low_freq_target(images, ids, patch, radius)
            assert found.dtype == dtype and not found.requires_grad
            expect_close(found, wanted, tolerance, f"{size, radius, dtype}, normalised")
            found = pixmim.low_freq_target(pixels.to(dtype), ids.int(), patch, radius, normalized=False)
            expect_close(found, wanted, tolerance, f"{size, radius, dtype}, on [0, 1]")
        found = pixmim.low_freq_target((pixels * 255).byte(), ids, patch, radius, normalized=False, exact=True)
        wanted = reference.low_freq_target((pixels * 255).byte().double() / 255, ids, patch, radius)
        expect_close(found, wanted, 4 * TOLERANCES[torch.float32], f"{size, radius}, bytes")


def pixel_statistics():
    return reference.MEAN, reference.STD


@check
def low_freq_target_has_the_published_filters_values(device):
    # An image of 8 x 8 and radius 2, through the released source. Its disc is half a bin off.
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    pixels = (((7 * y + 13 * x) % 32) / 31).float().expand(1, 3, 8, 8).to(device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    options = {"mean": (0, 0, 0), "std": (1, 1, 1), "normalized": False}
    rows = pixmim.low_freq_target(pixels, ids, 8, 2, **options).view(8, 8, 3).cpu()
    first = [0.42337384, 0.46778965, 0.49464346, 0.46084107, 0.44771645, 0.49512646, 0.50719404, 0.45305796]
    last = [0.4839632, 0.53274681, 0.57788448, 0.54386299, 0.49350006, 0.51713611, 0.54728162, 0.5139985]
    for row, wanted in [(0, first), (7, last)]:
        for colour in range(3):
            expect_close(rows[row, :, colour], torch.tensor(wanted), 1e-6, f"row {row}")


@check
def random_masking_is_a_split_that_depends_on_the_sample_alone(device):
    samples = torch.tensor([5, 2**40, 7, 5], device=device)
    keep, masked, restore = pixmim.random_masking(samples, 49, 0.7, epoch=3, seed=-4)
    assert keep.shape == (4, 14) and masked.shape == (4, 35) and keep.dtype == torch.int32
    both = torch.cat([keep, masked], 1).long()
    assert torch.equal(both.sort(1).values, torch.arange(49, device=device).expand(4, -1))
    assert torch.equal(both.argsort(1), restore.long())
    assert torch.equal(keep[0], keep[3]) and not torch.equal(keep[0], keep[1])
    alone = pixmim.random_masking(samples[1:2], 49, 0.7, epoch=torch.tensor([3], device=device), seed=-4)
    assert torch.equal(alone[0][0], keep[1])
    for other in ({"epoch": 4, "seed": -4}, {"epoch": 3, "seed": 4}):
        assert not torch.equal(pixmim.random_masking(samples, 49, 0.7, **other)[0], keep)
    on_cpu = pixmim.random_masking(samples.cpu(), 49, 0.7, epoch=3, seed=-4)
    assert torch.equal(on_cpu[2], restore.cpu())
    # Each patch is kept about as often: 14 of 49, of 2000 images.
    keep, _, _ = pixmim.random_masking(torch.arange(2000, device=device), 49, 0.7)
    share = keep.long().cpu().flatten().bincount(minlength=49) / 2000
    assert (share - 14 / 49).abs().max() < 0.06


@check
def blocks_of_patches_are_masked_together(device):
    _, _, restore = pixmim.random_masking(torch.arange(5, device=device), 36, 0.75, block=2)
    is_masked = (restore >= 9).view(5, 3, 2, 3, 2).transpose(2, 3).reshape(5, 9, 4)
    # 9 kept patches are two blocks and a quarter.
    assert (is_masked.all(-1) | ~is_masked.any(-1)).sum(1).tolist() == [8] * 5


@check
def gaps_and_odd_addresses_change_nothing(device):
    dtype = torch.float32
    qkv = randn(device, 2, 6, 48, dtype=dtype)
    inp, weight = randn(device, 5, 16, dtype=dtype), randn(device, 16, dtype=dtype, seed=1)

    def views(x):
        yield x.transpose(0, 1).contiguous().transpose(0, 1)
        yield torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        yield torch.stack([x, x], -1)[..., 0]

    for x in views(qkv):
        x, y = x.detach().requires_grad_(), qkv.detach().requires_grad_()
        found, wanted = pixmim.attention(x, 2), pixmim.attention(y, 2)
        assert torch.equal(found, wanted)
        above = randn(device, *found.shape, dtype=dtype, seed=2)
        found.backward(above.transpose(0, 1).contiguous().transpose(0, 1))
        wanted.backward(above)
        assert torch.equal(x.grad, y.grad)
        # A gradient of stride 0.
        pixmim.attention(x, 2).sum().backward()
    for x in views(inp):
        assert torch.equal(pixmim.layer_norm(x, weight, weight), pixmim.layer_norm(inp, weight, weight))


@check
def operators_pass_opcheck(device):
    for dtype in dtypes(device):
        qkv = randn(device, 2, 5, 48, dtype=dtype).requires_grad_()
        out, lse = torch.ops.pixmim.attention(qkv, 2)
        inp = randn(device, 4, 16, dtype=dtype).requires_grad_()
        weight, bias = (randn(device, 16, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
        normed, mean, rstd = torch.ops.pixmim.layer_norm(inp, weight, bias, 1e-5)
        pred = randn(device, 2, 3, 12, dtype=dtype).requires_grad_()
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        target = randn(device, 2, 3, 12, dtype=wide)
        calls = [
            (torch.ops.pixmim.attention_backward, [x.detach() for x in (out, out, lse, qkv)]),
            (torch.ops.pixmim.layer_norm_backward, [x.detach() for x in (normed, inp, mean, rstd, weight)]),
            (torch.ops.pixmim.attention, (qkv, 2)),
            (torch.ops.pixmim.layer_norm, (inp, weight, bias, 1e-5)),
            (torch.ops.pixmim.masked_mse_loss, (pred, target, True)),
        ]
        for operator, arguments in calls:
            torch.library.opcheck(operator.default, tuple(arguments))
    images, ids = randn(device, 2, 3, 8, 8, dtype=torch.float32), shuffled_ids(device, 2, 16, 5).int()
    colours = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    torch.library.opcheck(torch.ops.pixmim.low_freq_target.default, (images, ids, 2, 2.0, *colours, True, False))
    samples, epoch = torch.arange(3, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.pixmim.random_masking.default, (samples, epoch, 16, 4, 1, 0))


@check
def autocast_does_what_it_does_to_pytorchs_own(device):
    qkv, inp = randn(device, 2, 5, 48, dtype=torch.float32), randn(device, 4, 16, dtype=torch.float32)
    weight, bias = randn(device, 16, dtype=torch.float32, seed=1), randn(device, 16, dtype=torch.float32, seed=2)
    half = qkv.bfloat16()
    with torch.autocast(device, torch.bfloat16):
        attended = pixmim.attention(qkv, 2)
        assert attended.dtype == torch.bfloat16 and torch.equal(attended, pixmim.attention(half, 2))
        assert pixmim.layer_norm(inp, weight, bias).dtype == torch.float32
        normed = pixmim.layer_norm(inp.bfloat16(), weight, bias)
        assert torch.equal(normed, pixmim.layer_norm(inp.bfloat16().float(), weight, bias))
        if device == "cpu":
            assert pixmim.attention(qkv.double(), 2).dtype == torch.float64


@check
def half_precision_comes_back_as_it_was_given(device):
    for dtype in (torch.float16, torch.bfloat16):
        qkv = randn(device, 2, 5, 48, dtype=dtype)
        tolerance = TOLERANCES[dtype]
        expect_same_as(
            lambda x: reference.attention(x, 2), lambda x: pixmim.attention(x, 2), [qkv], tolerance, f"{dtype}"
        )
        inputs = [randn(device, *shape, dtype=dtype) for shape in ((4, 16), (16,), (16,))]
        expect_same_as(
            lambda *x: reference.layer_norm(*x, 1e-5),
            lambda *x: pixmim.layer_norm(*x),
            inputs,
            2 * tolerance,
            f"{dtype}",
        )
        pred = randn(device, 2, 3, 12, dtype=dtype)
        assert pixmim.masked_mse_loss(pred, pred.float() + 1, False).dtype == torch.float32


@check
def what_cannot_be_computed_is_refused_in_words(device):
    qkv = randn(device, 2, 5, 48, dtype=torch.float32)
    assert "float32" in raises(TypeError, lambda: pixmim.attention(qkv.int(), 2))
    assert "multiple of 5" in raises(ValueError, lambda: pixmim.attention(qkv, 5))
    inp = randn(device, 4, 16, dtype=torch.float32)
    half = torch.ones(16, dtype=torch.bfloat16, device=device)
    assert "weight is torch.bfloat16" in raises(TypeError, lambda: pixmim.layer_norm(inp, half, half))
    images, ids = randn(device, 2, 3, 16, 8, dtype=torch.float32), torch.zeros(2, 1, dtype=torch.int64, device=device)
    assert "pixels" in raises(pixmim.PixMIMError, lambda: pixmim.low_freq_target(images, ids, 4, 2))
    square = images[..., :8, :].contiguous()
    message = raises(pixmim.PixMIMError, lambda: pixmim.low_freq_target(square, ids, 4, 0.1))
    assert "keeps no frequency" in message
    assert "normalized=False" in raises(TypeError, lambda: pixmim.low_freq_target(square.byte(), ids, 4, 2))
    assert "3 colours" in raises(ValueError, lambda: pixmim.low_freq_target(square, ids, 4, 2, mean=(1, 2)))
    pred = randn(device, 2, 3, 12, dtype=torch.float32)
    error = raises(pixmim.PixMIMError, lambda: pixmim.masked_mse_loss(pred, pred[:, :2], True))
    assert "target" in error
    if device != "cpu":
        assert "not torch.float64" in raises(TypeError, lambda: pixmim.attention(qkv.double(), 2))
    else:
        assert "outside" in raises(pixmim.PixMIMError, lambda: pixmim.low_freq_target(square, ids + 4, 4, 2))


@check
def second_derivatives_are_refused(device):
    pred = randn(device, 2, 3, 12, dtype=torch.float32).requires_grad_()
    qkv = randn(device, 2, 5, 48, dtype=torch.float32).requires_grad_()
    for loss, x in [
        (pixmim.masked_mse_loss(pred, pred.detach() + 1, False), pred),
        (pixmim.attention(qkv, 2).square().sum(), qkv),
    ]:
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        raises(RuntimeError, lambda grad=grad: grad.sum().backward())


@check
def results_are_the_same_from_run_to_run_and_from_thread_to_thread(device):
    qkv = randn(device, 3, 197, 3 * 64, dtype=torch.float32)
    inp, weight = randn(device, 300, 64, dtype=torch.float32), randn(device, 64, dtype=torch.float32)

    def results():
        x, y = qkv.clone().requires_grad_(), inp.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        loss = pixmim.attention(x, 2).square().mean() + pixmim.layer_norm(y, w, weight).square().mean()
        loss.backward()
        return loss.detach(), x.grad, y.grad, w.grad

    first, found = results(), []
    threads = [threading.Thread(target=lambda: found.extend(results() for _ in range(3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for other in found:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def small_mae(device):
    torch.manual_seed(1)
    model = reference.Mae(reference.SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device), randn(device, 3, 3, 32, 32, dtype=torch.float32)


def step(model, images):
    """Loss, prediction, mask and all gradients of a step."""
    torch.manual_seed(7)
    model.zero_grad()
    loss, pred, mask = model(images)
    loss.backward()
    return loss.detach(), pred.detach(), mask, {name: p.grad.clone() for name, p in model.named_parameters()}


def expect_same_step(found, wanted, tolerance):
    for name, a, b in zip(("loss", "pred", "mask"), found, wanted, strict=False):
        expect_close(a, b, tolerance, name)
    assert found[3].keys() == wanted[3].keys()
    for name, grad in wanted[3].items():
        expect_close(found[3][name], grad, 30 * tolerance, f"gradient of {name}")


@check
def a_patched_mae_with_its_own_target_is_the_mae_it_was(device):
    model, images = small_mae(device)
    wanted = step(model, images)
    keys = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    assert pixmim.patch_vit_mae(model, None, masking=False) is model
    assert list(model.state_dict()) == keys
    expect_same_step(step(model, images), wanted, TOLERANCES[torch.float32])
    expect_same_step(step(copy.deepcopy(model), images), wanted, TOLERANCES[torch.float32])
    pixmim.unpatch_vit_mae(model)
    assert [type(module) for module in model.modules()] == classes
    again = step(model, images)
    assert all(torch.equal(again[3][name], grad) for name, grad in wanted[3].items())


@check
def a_patched_mae_learns_the_filtered_pixels_of_the_patches_it_masked(device):
    model, images = small_mae(device)
    pixmim.patch_vit_mae(model)
    loss, pred, mask, _ = step(model, images)
    assert mask.sum(1).tolist() == [12.0] * 3
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in pixel_statistics())
    ids = mask.argsort(dim=1, descending=True, stable=True)[:, :12]
    target = reference.low_freq_target(images * std + mean, ids, 8, 40 * 32 / 224)
    expect_close(loss, reference.masked_mse_loss(gather_patches(pred, ids), target, True), 2e-5, "loss")
    assert torch.equal(step(model, images)[2], mask)
    torch.manual_seed(8)
    assert not torch.equal(model(images)[2], mask)
    # A mask of the caller's own.
    fresh = pixmim.patch_vit_mae(small_mae(device)[0])
    assert torch.equal(fresh.forward_loss(images, pred, mask), loss)


@check
def a_patched_mae_compiles_whole(device):
    model, images = small_mae(device)
    pixmim.patch_vit_mae(model, masking=False)
    wanted = step(model, images)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled.zero_grad()
    torch.manual_seed(7)
    loss, pred, mask = compiled(images)
    loss.backward()
    found = loss.detach(), pred.detach(), mask, {name: p.grad for name, p in model.named_parameters()}
    expect_same_step(found, wanted, TOLERANCES[torch.float32])


@check
def gradient_checkpointing_changes_nothing(device):
    from torch.utils.checkpoint import checkpoint

    model, images = small_mae(device)
    pixmim.patch_vit_mae(model, None, masking=False)
    wanted = step(model, images)
    for block in model.blocks:
        block.forward = lambda x, forward=block.forward: checkpoint(forward, x, use_reentrant=False)
    expect_same_step(step(model, images), wanted, 0.0)
