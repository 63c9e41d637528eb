"""Turns a masked autoencoder that somebody else wrote into PixMIM, in place.

A module that is taken over gets a subclass of its own class, with another `forward`. So parameters, `state_dict`,
`isinstance`, hooks, `deepcopy` and optimizers see the module they knew, and giving back the old class undoes it all.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .loss import PixMIMLoss, patchify
from .ops import IMAGENET_MEAN, IMAGENET_STD


class _LayerNorm:
    def forward(self, inp: Tensor) -> Tensor:
        return ops.layer_norm(inp, self.weight, self.bias, self.eps)


class _PackedAttention:
    """With `qkv` and `proj`, as in timm and MAE."""

    def forward(self, x: Tensor, *masks, **more_masks) -> Tensor:
        is_masked = any(mask is not None and mask is not False for mask in (*masks, *more_masks.values()))
        dropout = getattr(getattr(self, "attn_drop", None), "p", 0.0)
        if is_masked or (self.training and dropout > 0):
            return super().forward(x, *masks, **more_masks)
        x = self.proj(ops.attention(self.qkv(x), self.num_heads))
        return self.proj_drop(x) if hasattr(self, "proj_drop") else x


class _SeparateAttention:
    """With linear layers of their own for queries, keys and values, as in Hugging Face's library."""

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, *more, **options):
        dropout = getattr(self, "attention_dropout", None) or getattr(self, "dropout_prob", None)
        if mask is not None or any(more) or options.get("output_attentions") or (self.training and dropout):
            return super().forward(hidden_states, mask, *more, **options)
        # Joining the weights moves fewer bytes than joining what three products make.
        parts = _queries_keys_values(self)
        weight = torch.cat([part.weight for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        out = ops.attention(F.linear(hidden_states, weight, bias), self.num_attention_heads)
        if hasattr(self, "o_proj"):
            out = self.o_proj(out)
        return out, None


def _queries_keys_values(module: nn.Module) -> list[nn.Module] | None:
    for names in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")):
        if all(hasattr(module, name) for name in names):
            return [getattr(module, name) for name in names]
    return None


def _draw(tokens: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's `random_masking`: kept tokens (B, K, D), mask (B, L) with 1 where one is gone, and ids_restore (B, L)."""
    images, patches, width = tokens.shape
    # From PyTorch's generator, so that `manual_seed` and CUDA graphs do what they do to `torch.rand`.
    samples = torch.randint(2**62, (images,), device=tokens.device)
    ids_keep, _, ids_restore = ops.random_masking(samples, patches, mask_ratio)
    kept = tokens.gather(1, ids_keep.long().unsqueeze(-1).expand(-1, -1, width))
    ids_restore = ids_restore.long()
    return kept, (ids_restore >= ids_keep.shape[1]).float(), ids_restore


class _HuggingFaceEmbeddings:
    def random_masking(self, sequence: Tensor, noise: Tensor | None = None):
        if noise is not None:
            return super().random_masking(sequence, noise)
        return _draw(sequence, self.config.mask_ratio)


class _HuggingFaceMae:
    def forward(self, pixel_values=None, noise=None, *, interpolate_pos_encoding=False, return_dict=None, **kwargs):
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput

        resized = {"interpolate_pos_encoding": interpolate_pos_encoding}
        found = self.vit(pixel_values, noise=noise, return_dict=True, **resized, **kwargs)
        latent, ids_restore = found.last_hidden_state, found.ids_restore
        logits = self.decoder(latent, ids_restore, **resized).logits
        # The class token stands before the kept.
        ids_masked = ids_restore.argsort(dim=1)[:, latent.shape[1] - 1 :]
        output = ViTMAEForPreTrainingOutput(
            loss=self.pixmim_loss(logits, pixel_values, ids_masked),
            logits=logits,
            mask=found.mask,
            ids_restore=ids_restore,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


class _Mae:
    """With the methods of MAE's own source."""

    def random_masking(self, x: Tensor, mask_ratio: float):
        drawn = _draw(x, mask_ratio) if self.pixmim_masking else super().random_masking(x, mask_ratio)
        # For `forward_loss`, which sees a mask: to count its ones would stop a GPU's stream.
        self.pixmim_masked = x.shape[1] - drawn[0].shape[1]
        return drawn

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        masked = int(mask[0].sum()) if self.pixmim_masked is None else self.pixmim_masked
        ids_masked = mask.argsort(dim=1, descending=True, stable=True)[:, :masked]
        return self.pixmim_loss(pred, imgs, ids_masked)


@functools.cache
def _subclass(original: type, mixin: type) -> type:
    # Under the same name, which Hugging Face writes into checkpoints; `repr` tells.
    contents = {"_pixmim_original": original, "_get_name": lambda self: f"PixMIM{original.__name__}"}
    return type(original.__name__, (mixin, original), contents)


def _take_over(module: nn.Module, mixin: type) -> None:
    module.__class__ = _subclass(type(module), mixin)


def _refusal(module: nn.Module) -> str | None:
    """Why an attention module keeps its own `forward`."""
    if (parts := _queries_keys_values(module)) is not None:
        if not all(type(part) is nn.Linear and (part.bias is None) == (parts[0].bias is None) for part in parts):
            return "its queries, keys and values are not three plain linear layers"
        head_dim = parts[0].out_features // module.num_attention_heads
    else:
        parts = ("q_norm", "k_norm", "norm")
        if any(not isinstance(getattr(module, part, None), (nn.Identity, type(None))) for part in parts):
            return "it normalises queries and keys, or what comes out"
        if getattr(module, "gate", None) is not None:
            return "it has a gate"
        head_dim = module.proj.in_features // module.num_heads
    scale = getattr(module, "scale", None) or getattr(module, "scaling", None) or head_dim**-0.5
    return None if abs(scale - head_dim**-0.5) < 1e-6 else f"its scale is {scale}"


def _patch_layers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        is_packed = all(hasattr(module, part) for part in ("qkv", "proj", "num_heads"))
        is_separate = hasattr(module, "num_attention_heads") and _queries_keys_values(module) is not None
        if is_packed or is_separate:
            if (why := _refusal(module)) is not None:
                warnings.warn(f"pixmim: {name} ({type(module).__name__}) is left as it is: {why}", stacklevel=3)
            else:
                _take_over(module, _PackedAttention if is_packed else _SeparateAttention)
        elif type(module) is nn.LayerNorm or (isinstance(module, nn.LayerNorm) and "timm." in type(module).__module__):
            if len(module.normalized_shape) == 1 and module.weight is not None and module.bias is not None:
                _take_over(module, _LayerNorm)


def patch_vit_mae(
    model: nn.Module,
    radius: float | Literal["pixmim"] | None = "pixmim",
    *,
    norm_pix: bool | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    masking: bool = True,
) -> nn.Module:
    """Turns a masked autoencoder into PixMIM on our kernels, in place.

    Takes a `ViTMAEForPreTraining` of Hugging Face's transformers, or a network laid out as MAE's own source: with
    `patch_embed`, `blocks` and `decoder_blocks` whose attention has `qkv` and `proj` (as timm's), `patchify`,
    `random_masking(x, mask_ratio)`, `forward_loss(imgs, pred, mask)` and `norm_pix_loss`. Layer norms, attention,
    random masking and the loss are taken over; names and shapes of parameters stay, so checkpoints fit both ways.
    `unpatch_vit_mae` undoes it.

    Modules that do what the kernels do not (masks, dropout inside attention, normalised queries) keep their own code.
    Attention weights are never formed, so `output_attentions` gives None, as with PyTorch's fused attention.

    Args:
        model: Changed in place. Patch it before wrapping or compiling it.
        radius: Of the low-pass filter of the target: see `PixMIMTarget`. None: MAE, as the network was.
        norm_pix: Whether target patches are normalised; None: as the network is configured. PixMIM does.
        mean: By which the images are normalised that the network is given.
        std: By which the images are normalised that the network is given.
        masking: Whether random masking is taken over too. If not, the network draws as before.

    Returns:
        `model`.
    """
    is_hugging_face = hasattr(model, "vit") and hasattr(model, "decoder") and hasattr(model, "config")
    parts = ("patch_embed", "blocks", "decoder_blocks", "random_masking", "forward_loss", "norm_pix_loss", "patchify")
    missing = [part for part in parts if not hasattr(model, part)]
    if missing and not is_hugging_face:
        raise TypeError(
            f"pixmim: {type(model).__name__} is neither a ViTMAEForPreTraining nor laid out as MAE (it has no "
            f"{', '.join(missing)}); use PixMIMLoss and the ops in its own code"
        )
    unpatch_vit_mae(model)
    if is_hugging_face:
        patch_embed, own_norm_pix = model.vit.embeddings.patch_embeddings.projection, model.config.norm_pix_loss
    else:
        patch_embed, own_norm_pix = model.patch_embed.proj, model.norm_pix_loss
    patch_size = patch_embed.kernel_size[0]
    probe = torch.arange(3 * (2 * patch_size) ** 2, dtype=torch.float32).view(1, 3, 2 * patch_size, 2 * patch_size)
    if not torch.equal(model.patchify(probe), patchify(probe, patch_size)):
        raise ValueError(f"pixmim: {type(model).__name__}'s patches are not in (row, column, channel) order")
    _patch_layers(model)
    model.pixmim_loss = PixMIMLoss(patch_size, radius, own_norm_pix if norm_pix is None else norm_pix, mean, std)
    if is_hugging_face:
        _take_over(model, _HuggingFaceMae)
        if masking:
            _take_over(model.vit.embeddings, _HuggingFaceEmbeddings)
    else:
        model.pixmim_masking, model.pixmim_masked = masking, None
        _take_over(model, _Mae)
    return model


def unpatch_vit_mae(model: nn.Module) -> nn.Module:
    """Undoes `patch_vit_mae`; returns `model`."""
    for module in model.modules():
        if (original := getattr(type(module), "_pixmim_original", None)) is not None:
            module.__class__ = original
    for name in ("pixmim_loss", "pixmim_masking", "pixmim_masked"):
        if hasattr(model, name):
            delattr(model, name)
    return model
