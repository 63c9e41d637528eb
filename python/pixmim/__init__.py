"""PixMIM and MAE in PyTorch, on the kernels of libpixmim: CPU and CUDA, with autograd and `torch.compile`.

`patch_vit_mae(model)` turns a masked autoencoder of Hugging Face or of MAE's own layout into PixMIM. `PixMIMLoss` and
`PixMIMTarget` are for networks of other layouts, and the functions are the ops themselves.
"""

from ._library import PixMIMError
from .loss import PixMIMLoss, PixMIMTarget, patchify
from .ops import attention, layer_norm, low_freq_target, masked_mse_loss, random_masking
from .patch import patch_vit_mae, unpatch_vit_mae

__all__ = [
    "PixMIMError",
    "PixMIMLoss",
    "PixMIMTarget",
    "attention",
    "layer_norm",
    "low_freq_target",
    "masked_mse_loss",
    "patch_vit_mae",
    "patchify",
    "random_masking",
    "unpatch_vit_mae",
]
__version__ = "0.1.0"
