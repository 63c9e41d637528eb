"""PyTorch's counterparts of our ops, at the shapes and under the names of benches/ops."""

import math

import torch
import torch.nn.functional as F
from mae_step import MEAN, SIZES, STD, low_pass, low_pass_filter, patches
from measure import BF16, F32
from torch.nn.attention import SDPBackend, sdpa_kernel

# Network, stack: tokens, width, heads, images.
STACKS = {
    "vit_b encoder": (50, 768, 12, 4096),
    "vit_b decoder": (197, 512, 16, 4096),
    "vit_b encoder unmasked": (197, 768, 12, 1024),
    "lsmae encoder unmasked": (785, 768, 12, 256),
    "vit_h encoder": (65, 1280, 16, 1024),
    "vit_h decoder": (257, 512, 16, 1024),
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def peak(bench):
    size, side = bench.pick((1 << 30, 8192), (1 << 20, 64))
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
    copy = torch.empty_like(source)
    times = bench.times(lambda: copy.copy_(source))
    bench.row(("peak", "copy", f"{size >> 20} MiB"), 1, "u8", "copy_", times, nbytes=2 * size)
    a, b = bench.random(side, side), bench.random(side, side)
    bench.row(("peak", "product", side), 1, "bf16", "matmul", bench.times(lambda: a @ b), flops=2 * side**3)


def attention(bench):
    """Forced to each backend, on queries, keys and values as the layer before leaves them; useful operations, whatever a
    kernel pads."""
    for shape, (tokens, dim, heads, images) in STACKS.items():
        width, images = dim // heads, bench.pick(images, 2)
        qkv = bench.random(images, tokens, 3, heads, width)
        q, k, v = parts = [part.requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4).unbind(0)]
        grad = bench.random(images, tokens, heads, width).transpose(1, 2)
        # The formula, on the last image: at large batches the first to be wrong.
        last = [part[-1:].detach().double().requires_grad_() for part in parts]
        want = (last[0] @ last[1].transpose(-1, -2) / math.sqrt(width)).softmax(-1) @ last[2]
        wanted = [want, *torch.autograd.grad(want, last, grad[-1:].double())]
        flops, size = 4 * images * heads * tokens**2 * width, images * tokens * dim * 2
        for name, backend in BACKENDS.items():
            try:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(q, k, v)
                    found = [out, *torch.autograd.grad(out, parts, grad, retain_graph=True)]
                    if not bench.agrees(f"{shape} {name}", [part[-1:] for part in found], wanted, 2e-2):
                        continue
                    del found
                    with torch.no_grad():
                        forward = bench.times(lambda: F.scaled_dot_product_attention(q, k, v))
                    backward = bench.times(lambda: torch.autograd.grad(out, parts, grad, retain_graph=True))
            except RuntimeError as error:
                # Not every backend takes every shape on every GPU, or has the memory for it.
                bench.say(f"{shape} {name}: {str(error).splitlines()[0][:120]}")
                continue
            bench.row(("attention", "forward", shape), images, "bf16", name, forward, nbytes=4 * size, flops=flops)
            bench.row(("attention", "backward", shape), images, "bf16", name, backward, nbytes=8 * size, flops=2.5 * flops)


def layer_norm(bench):
    for shape in ("vit_b encoder", "vit_b decoder"):
        tokens, dim, _, images = STACKS[shape]
        images = bench.pick(images, 2)
        x, grad = bench.random(images * tokens, dim).requires_grad_(), bench.random(images * tokens, dim)
        leaves = x, *(bench.random(dim).requires_grad_() for _ in range(2))
        exact = [leaf[-1:].detach().double().requires_grad_() if leaf is x else leaf.detach().double() for leaf in leaves]
        want = F.layer_norm(exact[0], (dim,), *exact[1:], 1e-6)
        wanted = want, *torch.autograd.grad(want, exact[:1], grad[-1:].double())
        for name, run in bench.variants(lambda x, w, b: F.layer_norm(x, (dim,), w, b, 1e-6)).items():
            out = run(*leaves)
            found = out[-1:], torch.autograd.grad(out, x, grad, retain_graph=True)[0][-1:]
            if not bench.agrees(f"{shape} {name}", found, wanted, 1e-2):
                continue
            with torch.no_grad():
                forward = bench.times(lambda: run(*leaves))
            bench.row(("layer_norm", "forward", shape), images, "bf16", name, forward, nbytes=2 * 2 * x.numel())
            backward = bench.times(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
            # Ours adds to the gradient of the residual stream; PyTorch writes it, and another kernel adds.
            bench.row(("layer_norm", "backward", shape), images, "bf16", name, backward, nbytes=3 * 2 * x.numel())


def low_pass_by_products(images, forth, keep):
    """As mae_step.low_pass, over the few frequencies that are kept."""
    back = forth.conj() / forth.shape[0]
    spectrum = forth.t() @ (images.to(forth.dtype) @ forth)
    return (back @ (spectrum * keep) @ back.t()).abs()


def low_pass_filters(side, radius, device):
    """The filter by transforms, and by products with the rows to and from the frequencies that are kept."""
    keep = low_pass_filter(side, radius)
    kept = keep.any(0).nonzero().flatten()
    angle = 2 * math.pi * ((torch.arange(side)[:, None] * kept) % side).double() / side
    forth = torch.complex(angle.cos(), -angle.sin()).to(torch.complex64).to(device)
    pairs, keep = keep[kept][:, kept].to(device), keep.to(device)
    return {"fft": lambda x: low_pass(x, keep), "products": lambda x: low_pass_by_products(x, forth, pairs)}


def low_freq_target(bench):
    """uint8 images to the filtered, normalised patches that are masked."""
    size, count = bench.pick((SIZES["vit_b"], 4096), (SIZES["small64"], 2))
    # The complex spectra of more images at once would take tens of GB.
    part = bench.pick(256, 2)
    images = bench.images(count, size.image)
    mean, std = (torch.tensor(value, device=bench.device).view(3, 1, 1) for value in (MEAN, STD))
    row = torch.arange(part, device=bench.device)[:, None]
    masked = torch.rand(count, size.grid**2, device=bench.device).argsort(1)[:, size.grid**2 // 4 :]

    def target(run):
        for i in range(0, count, part):
            x = run(images[i : i + part].float().div_(255))
            last = patches((x - mean) / std, size.patch, "rwc")[row, masked[i : i + part]]
        return last

    filters, wanted = low_pass_filters(size.image, size.radius, bench.device), None
    for name, run in filters.items():
        found = target(run)
        wanted = found if wanted is None else wanted
        if bench.agrees(name, [found], [wanted], 1e-4):
            times = bench.times(lambda: target(run), 5)
            bench.row(("low_freq_target", "forward", "vit_b"), count, "f32", name, times, images=count)


def masked_mse_loss(bench):
    """Normalised target patches, and the loss with its gradient."""
    shape = (bench.pick(4096, 2), 147, 768)
    prediction, target = bench.random(*shape).requires_grad_(), bench.random(*shape, dtype=F32)

    def forward(prediction, target):
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        return F.mse_loss(prediction.float(), (target - mean) / (variance + 1e-6).sqrt())

    def gradient(run):
        return torch.autograd.grad(run(prediction, target), prediction)

    normed = target[-1].double()
    variance, mean = torch.var_mean(normed, -1, keepdim=True)
    wanted = [2 * (prediction[-1].double() - (normed - mean) / (variance + 1e-6).sqrt()) / prediction.numel()]
    for name, run in bench.variants(forward).items():
        if bench.agrees(name, [gradient(run)[0][-1]], wanted, 1e-2):
            times = bench.times(lambda: gradient(run))
            bench.row(("masked_mse_loss", "norm_pix", "vit_b"), shape[0], "bf16", name, times, nbytes=8 * target.numel())


def adamw(bench):
    """111.7 million parameters, as ViT-B with its decoder has; read and written: weight, moments; read: gradient."""
    sizes = [bench.pick(111_655_680 // 16, 64)] * 16
    start, grads = [bench.random(size, dtype=F32) for size in sizes], [bench.random(size, dtype=F32) for size in sizes]
    wanted = None
    for name in ("foreach", "fused"):
        parameters = [torch.nn.Parameter(values.clone()) for values in start]
        for parameter, grad in zip(parameters, grads):
            parameter.grad = grad
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, **{name: True})
        optimizer.step()
        found = [parameters[-1].detach() - start[-1]]
        wanted = [found[0].clone()] if wanted is None else wanted
        if bench.agrees(name, found, wanted, 1e-3):
            times = bench.times(optimizer.step)
            bench.row(("adamw", "update", "vit_b"), sum(sizes), "f32", name, times, nbytes=28 * sum(sizes))
    times = bench.times(lambda: torch.nn.utils.get_total_norm(grads))
    bench.row(("grad_norm", "forward", "vit_b"), sum(sizes), "f32", "foreach", times, nbytes=4 * sum(sizes))


def linear(bench):
    """Each layer of a block: the product with its bias, and GELU or the residual; then its gradients, that of the input
    through GELU where it is one's output."""
    for shape in ("vit_b encoder", "vit_b decoder"):
        tokens, dim, _, images = STACKS[shape]
        images = bench.pick(images, 2)
        rows = images * tokens
        for layer, inputs, outputs in (
            ("qkv", dim, 3 * dim), ("proj", dim, dim), ("fc1", dim, 4 * dim), ("fc2", 4 * dim, dim),
        ):
            # Small weights: the results stay of the size of the inputs.
            x, weight = bench.random(rows, inputs), bench.random(outputs, inputs) / math.sqrt(inputs)
            bias, other, grad = bench.random(outputs), bench.random(rows, outputs), bench.random(rows, outputs)

            def forward(x, weight, bias, other):
                out = F.linear(x, weight, bias)
                if layer == "fc1":
                    return out, F.gelu(out)
                return (out if layer == "qkv" else out + other,)

            def backward(grad, x, weight):
                grad_x = grad @ weight
                if layer == "fc2":
                    # Of GELU's input, which has the size of `x`.
                    grad_x = torch.ops.aten.gelu_backward(grad_x, x)
                return grad_x, grad.t() @ x, grad.sum(0)

            few = slice(-64, None)
            exact = [part.double() for part in (x[few], weight, bias, other[few])]
            wanted = forward(*exact)
            grad_x = backward(grad[few].double(), exact[0], exact[1])[0]
            flops = 2 * rows * outputs * inputs
            name = f"{shape} {layer}"
            for variant, run in bench.variants(forward).items():
                if bench.agrees(f"{name} {variant}", [part[few] for part in run(x, weight, bias, other)], wanted, 1e-2):
                    times = bench.times(lambda: run(x, weight, bias, other), 9)
                    bench.row(("linear", "forward", name), images, "bf16", variant, times, flops=flops)
            sums = None
            for variant, run in bench.variants(backward).items():
                found = run(grad, x, weight)
                sums = found[1:] if sums is None else sums
                if bench.agrees(f"{name} {variant}", [found[0][few], *found[1:]], [grad_x, *sums], 2e-2):
                    times = bench.times(lambda: run(grad, x, weight), 9)
                    bench.row(("linear", "backward", name), images, "bf16", variant, times, flops=2 * flops)


def input(bench):
    """uint8 images to the normalised patches that are kept."""
    size, count = bench.pick((SIZES["vit_b"], 4096), (SIZES["small64"], 2))
    images = bench.images(count, size.image)
    mean, std = (torch.tensor(value, device=bench.device).view(3, 1, 1) for value in (MEAN, STD))
    row = torch.arange(count, device=bench.device)[:, None]
    keep = torch.rand(count, size.grid**2, device=bench.device).argsort(1)[:, : size.grid**2 // 4]

    def forward(images):
        return patches((images.float() / 255 - mean) / std, size.patch, "crw")[row, keep].to(BF16)

    wanted = [patches((images[-1:].double() / 255 - mean) / std, size.patch, "crw")[0, keep[-1]]]
    nbytes = images.numel() + keep.numel() * 3 * size.patch**2 * 2
    for name, run in bench.variants(forward).items():
        if bench.agrees(name, [run(images)[-1]], wanted, 1e-2):
            bench.row(("input", "filtered", "vit_b"), count, "bf16", name, bench.times(lambda: run(images), 9), nbytes=nbytes)
