"""The ops, as functions of tensors. Dimension letters: B images, S pixels of a side, P pixels of a patch's side, L
patches of an image, K kept and M = L - K masked ones, E = 3 P P numbers of a patch, T tokens, D width, NH heads.

Each stands on a `torch.library` op, `torch.ops.pixmim.*`, with a shape function and autograd (first derivatives), so it
works under `torch.compile`, in CUDA graphs (call it once before capturing), and on the current stream. Results are the
same from run to run. Inputs that are not contiguous are copied.

Dtypes: float32 and, on the CPU, float64, on a GPU bfloat16. `float16`, and `bfloat16` on the CPU, are computed in
float32 and come back in their own dtype. Autocast: `attention` runs in its dtype, `layer_norm` and the loss's sums in
float32, as PyTorch's own do.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._library import Function, dense

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEVICES = ("cpu", "cuda")

_random_masking = Function("random_masking_forward", "tttuttl")
_low_freq_target = Function("low_freq_target_forward", "tttpvvli")
_masked_mse_loss = Function("masked_mse_loss_forward_backward", "ttttid")
_layer_norm_forward = Function("layer_norm_forward", "ttttttd", workspace=False)
_layer_norm_backward = Function("layer_norm_backward", "tttttttt")
_attention_forward = Function("attention_forward", "ttt")
_attention_backward = Function("attention_backward", "ttttt")


def kernel_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that the tensor is computed in on its device."""
    dtype, on_gpu = tensor.dtype, tensor.device.type == "cuda"
    if dtype == torch.float32 or dtype == (torch.bfloat16 if on_gpu else torch.float64):
        return dtype
    if dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    takes = "float32, bfloat16 or float16" if on_gpu else "float32, float64, bfloat16 or float16"
    raise TypeError(f"pixmim: on {tensor.device} ops take {takes}, not {dtype}: cast the tensor, or move it")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, losses and targets."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast asks for, or None where it is off or does not meddle."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


# Random masking


@torch.library.custom_op(
    "pixmim::random_masking",
    mutates_args=(),
    device_types=DEVICES,
    schema="(Tensor samples, Tensor epoch, int patches, int kept, int block, int seed) -> (Tensor, Tensor, Tensor)",
)
def _random_masking_op(samples, epoch, patches, kept, block, seed):
    device = samples.device
    images = samples.shape[0]
    ids_keep, ids_masked, ids_restore = (
        torch.empty(images, n, dtype=torch.int32, device=device) for n in (kept, patches - kept, patches)
    )
    samples, epoch = dense(samples), dense(epoch)
    _random_masking(device, ids_keep, ids_masked, ids_restore, seed, epoch, samples, block)
    return ids_keep, ids_masked, ids_restore


@_random_masking_op.register_fake
def _(samples, epoch, patches, kept, block, seed):
    images = samples.shape[0]
    return tuple(samples.new_empty(images, n, dtype=torch.int32) for n in (kept, patches - kept, patches))


def random_masking(
    samples: Tensor, patches: int, mask_ratio: float = 0.75, *, epoch: int | Tensor = 0, seed: int = 0, block: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws which patches of each image are kept: `int(L (1 - mask_ratio))` of them.

    Args:
        samples: (B,) int64. An image's number decides, with `epoch` and `seed`, what is drawn: the same on each device
            and in whatever batch. Random numbers will do: `torch.randint(2**62, (B,), device=device)`.
        patches: L, a square.
        mask_ratio: Share of the patches that is masked.
        epoch: Below 2^28. As a (1,) int64 tensor on the device it may change between replays of a CUDA graph.
        seed: Of the run.
        block: Patches along a side of the squares that are kept or masked together; 1: each patch by itself.

    Returns:
        ids_keep (B, K), ids_masked (B, M), and ids_restore (B, L): where patch l stands in the two. All int32.
    """
    if not isinstance(epoch, Tensor):
        epoch = torch.full((1,), epoch, dtype=torch.int64, device=samples.device)
    kept = int(patches * (1 - mask_ratio))
    return torch.ops.pixmim.random_masking.default(samples, epoch, patches, kept, block, seed)


# PixMIM's target


@functools.lru_cache(maxsize=64)
def _colours(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """On the device, kept: making it stops the stream."""
    return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


@torch.library.custom_op(
    "pixmim::low_freq_target",
    mutates_args=(),
    device_types=DEVICES,
    schema="(Tensor images, Tensor ids_masked, int patch_size, float radius, float[] mean, float[] std, "
    "bool normalized, bool exact) -> Tensor",
)
def _low_freq_target_op(images, ids_masked, patch_size, radius, mean, std, normalized, exact):
    device = images.device
    mean, std = tuple(mean), tuple(std)
    pixels = images
    if normalized:
        # Here, not in Python that a compiler traces: the tables of colours must be real tensors.
        pixels = torch.addcmul(_colours(mean, device, images.dtype), images, _colours(std, device, images.dtype))
    pixels, ids_masked = dense(pixels), dense(ids_masked)
    target = _target_like(images, ids_masked, patch_size)
    filter_ = _library.low_pass_filter(device, images.shape[-1], radius)
    _low_freq_target(device, target, pixels, ids_masked, filter_, mean, std, patch_size, exact)
    return target


def _target_like(images, ids_masked, patch_size):
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    return images.new_empty(*ids_masked.shape, 3 * patch_size * patch_size, dtype=dtype)


@_low_freq_target_op.register_fake
def _(images, ids_masked, patch_size, radius, mean, std, normalized, exact):
    return _target_like(images, ids_masked, patch_size)


def low_freq_target(
    images: Tensor,
    ids_masked: Tensor,
    patch_size: int,
    radius: float,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    normalized: bool = True,
    exact: bool = False,
) -> Tensor:
    """PixMIM's target: the images through an ideal low-pass filter, and of them the masked patches.

    As in the released source, the filter sees colours on [0, 1], it is a disc of the shifted spectrum around
    (S - 1) / 2, and of its complex result the magnitude is taken; that is normalised again and patchified as (row,
    column, channel). A constant: no gradient flows through it.

    Args:
        images: (B, 3, S, S), normalised by `mean` and `std`; or, with `normalized=False`, on [0, 1], or uint8 bytes.
        ids_masked: (B, M), int32 or int64, all different in an image. On a GPU nobody checks that they are in range.
        patch_size: P, which divides S.
        radius: Of the disc, in cycles per image. PixMIM has 40 at 224.
        mean: Of the colours, on [0, 1].
        std: Of the colours.
        normalized: Whether `images` are normalised.
        exact: On a GPU, bytes of 224 pixels at radius 40 and of 448 at 80 are filtered in half precision (an error of
            about 1e-3 in a patch of unit variance) unless this is set. All else is exact.

    Returns:
        (B, M, E), float32, or float64 if the images are.
    """
    images = images.detach()
    if images.dtype == torch.uint8:
        if normalized:
            raise TypeError("pixmim: images of bytes are not normalised: pass normalized=False")
        if images.device.type == "cpu":
            images = images.float() / 255
    else:
        images = images.to(wide(kernel_dtype(images)))
    mean, std = [float(x) for x in mean], [float(x) for x in std]
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"pixmim: mean and std have a number for each of 3 colours, not {len(mean)} and {len(std)}")
    return torch.ops.pixmim.low_freq_target.default(
        images, ids_masked.to(torch.int32), patch_size, float(radius), mean, std, normalized, exact
    )


# The loss


@torch.library.custom_op(
    "pixmim::masked_mse_loss",
    mutates_args=(),
    device_types=DEVICES,
    schema="(Tensor pred, Tensor target, bool norm_pix) -> (Tensor, Tensor)",
)
def _masked_mse_loss_op(pred, target, norm_pix):
    pred, target = dense(pred), dense(target)
    # Accumulates.
    loss = torch.zeros((), dtype=target.dtype, device=pred.device)
    grad_pred = torch.empty_like(pred)
    _masked_mse_loss(pred.device, loss.view(1), grad_pred, pred, target, norm_pix, 1.0)
    return loss, grad_pred


@_masked_mse_loss_op.register_fake
def _(pred, target, norm_pix):
    return target.new_empty(()), torch.empty_like(pred, memory_format=torch.contiguous_format)


def _masked_mse_loss_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


@torch.autograd.function.once_differentiable
def _masked_mse_loss_grad(ctx, grad_loss, _):
    if grad_loss is None:
        return None, None, None
    (grad_pred,) = ctx.saved_tensors
    return grad_pred * grad_loss, None, None


_masked_mse_loss_op.register_autograd(_masked_mse_loss_grad, setup_context=_masked_mse_loss_setup)


def masked_mse_loss(pred: Tensor, target: Tensor, norm_pix: bool = True) -> Tensor:
    """Mean squared error over the numbers of the masked patches.

    Args:
        pred: (B, M, E).
        target: (B, M, E). No gradient flows to it.
        norm_pix: Whether each target patch is normalised first, by its own mean and its variance with E - 1 below.

    Returns:
        The loss, a float32 number, or float64 if `pred` is.
    """
    pred = pred.to(kernel_dtype(pred))
    target = target.detach().to(wide(pred.dtype))
    return torch.ops.pixmim.masked_mse_loss.default(pred, target, norm_pix)[0]


# Layer norm


@torch.library.custom_op(
    "pixmim::layer_norm",
    mutates_args=(),
    device_types=DEVICES,
    schema="(Tensor inp, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_op(inp, weight, bias, eps):
    inp, weight, bias = dense(inp), dense(weight), dense(bias)
    out, mean, rstd = _layer_norm_like(inp)
    _layer_norm_forward(inp.device, out, mean, rstd, inp, weight, bias, eps)
    return out, mean, rstd


def _layer_norm_like(inp):
    out = torch.empty_like(inp, memory_format=torch.contiguous_format)
    return out, *(inp.new_empty(inp.shape[:-1], dtype=wide(inp.dtype)) for _ in range(2))


@_layer_norm_op.register_fake
def _(inp, weight, bias, eps):
    return _layer_norm_like(inp)


@torch.library.custom_op(
    "pixmim::layer_norm_backward",
    mutates_args=(),
    device_types=DEVICES,
    schema="(Tensor grad_out, Tensor inp, Tensor mean, Tensor rstd, Tensor weight) -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_backward_op(grad_out, inp, mean, rstd, weight):
    grad_out, inp, mean, rstd, weight = map(dense, (grad_out, inp, mean, rstd, weight))
    # All three accumulate.
    grads = [grad.zero_() for grad in _layer_norm_grads_like(inp, weight)]
    _layer_norm_backward(inp.device, *grads, grad_out, inp, mean, rstd, weight)
    return tuple(grads)


def _layer_norm_grads_like(inp, weight):
    grad_inp = torch.empty_like(inp, memory_format=torch.contiguous_format)
    return grad_inp, *(weight.new_empty(weight.shape, dtype=wide(weight.dtype)) for _ in range(2))


@_layer_norm_backward_op.register_fake
def _(grad_out, inp, mean, rstd, weight):
    return _layer_norm_grads_like(inp, weight)


def _layer_norm_setup(ctx, inputs, output):
    inp, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inp, mean, rstd, weight)


def _layer_norm_grad(ctx, grad_out, _mean, _rstd):
    if grad_out is None:
        return None, None, None, None
    # Read once: under gradient checkpointing they may be unpacked only once.
    inp, mean, rstd, weight = ctx.saved_tensors
    grad_inp, *grads = torch.ops.pixmim.layer_norm_backward.default(grad_out, inp, mean, rstd, weight)
    return grad_inp, *(grad.to(weight.dtype) for grad in grads), None


_layer_norm_op.register_autograd(_layer_norm_grad, setup_context=_layer_norm_setup)


def layer_norm(inp: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension, as `torch.nn.functional.layer_norm`.

    Args:
        inp: (.., D). On a GPU D is a multiple of 8, and at most 8192.
        weight: (D,), dtype of `inp`, but under autocast.
        bias: (D,), likewise.
        eps: Added to the variance.
    """
    dtype = kernel_dtype(inp)
    returned = inp.dtype
    if autocast_dtype(inp) is not None:
        dtype = returned = torch.float32
        weight, bias = weight.to(dtype), bias.to(dtype)
    if weight.dtype != returned or bias.dtype != returned:
        raise TypeError(
            f"pixmim: layer_norm's weight is {weight.dtype} and its bias {bias.dtype}, but its input {inp.dtype}: "
            "cast one of them"
        )
    inp, weight, bias = inp.to(dtype), weight.to(dtype), bias.to(dtype)
    return torch.ops.pixmim.layer_norm.default(inp, weight, bias, eps)[0].to(returned)


# Attention


@torch.library.custom_op(
    "pixmim::attention",
    mutates_args=(),
    device_types=DEVICES,
    schema="(Tensor qkv, int num_heads) -> (Tensor, Tensor)",
)
def _attention_op(qkv, num_heads):
    qkv = dense(qkv)
    out, lse = _attention_like(qkv, num_heads)
    _attention_forward(qkv.device, out, lse, qkv)
    return out, lse


def _attention_like(qkv, num_heads):
    images, tokens, width = qkv.shape
    return qkv.new_empty(images, tokens, width // 3), qkv.new_empty(images, num_heads, tokens, dtype=wide(qkv.dtype))


@_attention_op.register_fake
def _(qkv, num_heads):
    return _attention_like(qkv, num_heads)


@torch.library.custom_op(
    "pixmim::attention_backward",
    mutates_args=(),
    device_types=DEVICES,
    schema="(Tensor grad_out, Tensor out, Tensor lse, Tensor qkv) -> Tensor",
)
def _attention_backward_op(grad_out, out, lse, qkv):
    grad_out, out, lse, qkv = map(dense, (grad_out, out, lse, qkv))
    grad_qkv = torch.empty_like(qkv)
    _attention_backward(qkv.device, grad_qkv, grad_out, out, lse, qkv)
    return grad_qkv


@_attention_backward_op.register_fake
def _(grad_out, out, lse, qkv):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _attention_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, inputs[0])


def _attention_grad(ctx, grad_out, _lse):
    if grad_out is None:
        return None, None
    return torch.ops.pixmim.attention_backward.default(grad_out, *ctx.saved_tensors), None


_attention_op.register_autograd(_attention_grad, setup_context=_attention_setup)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Self-attention, softmax(q k^T / sqrt(D / NH)) v, without mask and without dropout.

    Args:
        qkv: (B, T, 3 D): queries, keys and values, each head after head, as one linear layer makes them in timm. On a
            GPU T is at most 1024 and a head is 8 to 128 wide, a multiple of 8.
        num_heads: NH.

    Returns:
        (B, T, D), head after head.
    """
    if (dtype := autocast_dtype(qkv)) is not None:
        qkv = qkv.to(dtype)
    dtype = qkv.dtype
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * num_heads) != 0:
        shape = tuple(qkv.shape)
        raise ValueError(f"pixmim: attention takes (B, T, 3 D) with D a multiple of {num_heads}, not {shape}")
    return torch.ops.pixmim.attention.default(qkv.to(kernel_dtype(qkv)), num_heads)[0].to(dtype)
