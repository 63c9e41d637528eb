//! What a forward pass keeps for the backward pass, and the gradients that pass between blocks.

use super::MaeConfig;
use crate::ops::{attention, layer_norm, masked_mse_loss, patch_embed, random_masking};
use crate::{Arena, DType, Device, Tensor};

/// How many images, and how much of each is kept and predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Images (B).
    pub images: usize,
    /// Patches of an image that the encoder sees (K).
    pub kept: usize,
    /// Patches of an image that are predicted: the masked ones (M) in training, all (L) for a picture.
    pub predicted: usize,
}

/// Kept of one transformer block. Written by its forward pass, read by its backward pass.
#[derive(Debug)]
pub struct BlockActivations {
    /// `(B, T, D)`: normalised input of attention.
    pub norm1: Tensor,
    /// `(B, T)`.
    pub mean1: Tensor,
    /// `(B, T)`.
    pub rstd1: Tensor,
    /// `(B, T, 3 D)`.
    pub qkv: Tensor,
    /// `(B, NH, T)`.
    pub lse: Tensor,
    /// `(B, T, D)`: attention's mixed values.
    pub mixed: Tensor,
    /// `(B, T, D)`: residual stream after attention.
    pub middle: Tensor,
    /// `(B, T, D)`: normalised input of the MLP.
    pub norm2: Tensor,
    /// `(B, T)`.
    pub mean2: Tensor,
    /// `(B, T)`.
    pub rstd2: Tensor,
    /// `(B, T, F)`: input of GELU.
    pub pre_gelu: Tensor,
    /// `(B, T, F)`: output of GELU.
    pub hidden: Tensor,
    /// `(B, T, D)`: residual stream after the block.
    pub out: Tensor,
}

impl BlockActivations {
    fn new(arena: &mut Arena, dtype: DType, [b, t, d]: [usize; 3], heads: usize, f: usize) -> Self {
        Self {
            norm1: arena.tensor(dtype, &[b, t, d]),
            mean1: arena.tensor(dtype.wide(), &[b, t]),
            rstd1: arena.tensor(dtype.wide(), &[b, t]),
            qkv: arena.tensor(dtype, &[b, t, 3 * d]),
            lse: arena.tensor(dtype.wide(), &[b, heads, t]),
            mixed: arena.tensor(dtype, &[b, t, d]),
            middle: arena.tensor(dtype, &[b, t, d]),
            norm2: arena.tensor(dtype, &[b, t, d]),
            mean2: arena.tensor(dtype.wide(), &[b, t]),
            rstd2: arena.tensor(dtype.wide(), &[b, t]),
            pre_gelu: arena.tensor(dtype, &[b, t, f]),
            hidden: arena.tensor(dtype, &[b, t, f]),
            out: arena.tensor(dtype, &[b, t, d]),
        }
    }
}

/// Kept of the whole network.
#[derive(Debug)]
pub struct Activations {
    /// `(B, K, E)`: kept patches, (channel, row, column).
    pub patches: Tensor,
    /// `(B, K)` i32: kept patches.
    pub ids_keep: Tensor,
    /// `(B, L)` i32: where each patch stands among kept and masked ones.
    pub ids_restore: Tensor,
    /// `(B, predicted)` i32: predicted patches.
    pub ids_predicted: Tensor,
    /// `(B, 1 + K, D)`: the encoder's tokens.
    pub tokens: Tensor,
    /// Encoder blocks.
    pub blocks: Vec<BlockActivations>,
    /// `(B, 1 + K, D)`: the encoder's output, normalised.
    pub latent: Tensor,
    /// `(B, 1 + K)`.
    pub latent_mean: Tensor,
    /// `(B, 1 + K)`.
    pub latent_rstd: Tensor,
    /// `(B, 1 + K, Dd)`: the latent at the decoder's width.
    pub embedded: Tensor,
    /// `(B (1 + K) + L, Dd)`: kept tokens and, for each patch, the mask token, with their positions.
    pub decoder_rows: Tensor,
    /// `(B, 1 + L, Dd)`: the decoder's tokens.
    pub decoder_tokens: Tensor,
    /// Decoder blocks.
    pub decoder_blocks: Vec<BlockActivations>,
    /// `(B, predicted, Dd)`: the predicted patches' tokens, normalised.
    pub decoded: Tensor,
    /// `(B, predicted)`.
    pub decoded_mean: Tensor,
    /// `(B, predicted)`.
    pub decoded_rstd: Tensor,
    /// `(B, predicted, E)`: predicted patches, (row, column, channel).
    pub pred: Tensor,
}

impl Activations {
    /// Carves the activations of `batch` out of an arena.
    #[must_use]
    pub fn new(arena: &mut Arena, dtype: DType, config: &MaeConfig, batch: Batch) -> Self {
        let Batch { images: b, kept, predicted } = batch;
        let MaeConfig { dim, decoder_dim, heads, decoder_heads, mlp_ratio, .. } = *config;
        let (patches, e) = (config.patches(), config.patch_numbers());
        let (short, long) = (1 + kept, 1 + patches);
        Self {
            patches: arena.tensor(dtype, &[b, kept, e]),
            ids_keep: arena.tensor(DType::I32, &[b, kept]),
            ids_restore: arena.tensor(DType::I32, &[b, patches]),
            ids_predicted: arena.tensor(DType::I32, &[b, predicted]),
            tokens: arena.tensor(dtype, &[b, short, dim]),
            blocks: (0..config.depth)
                .map(|_| {
                    BlockActivations::new(arena, dtype, [b, short, dim], heads, mlp_ratio * dim)
                })
                .collect(),
            latent: arena.tensor(dtype, &[b, short, dim]),
            latent_mean: arena.tensor(dtype.wide(), &[b, short]),
            latent_rstd: arena.tensor(dtype.wide(), &[b, short]),
            embedded: arena.tensor(dtype, &[b, short, decoder_dim]),
            decoder_rows: arena.tensor(dtype, &[b * short + patches, decoder_dim]),
            decoder_tokens: arena.tensor(dtype, &[b, long, decoder_dim]),
            decoder_blocks: (0..config.decoder_depth)
                .map(|_| {
                    let (shape, hidden) = ([b, long, decoder_dim], mlp_ratio * decoder_dim);
                    BlockActivations::new(arena, dtype, shape, decoder_heads, hidden)
                })
                .collect(),
            decoded: arena.tensor(dtype, &[b, predicted, decoder_dim]),
            decoded_mean: arena.tensor(dtype.wide(), &[b, predicted]),
            decoded_rstd: arena.tensor(dtype.wide(), &[b, predicted]),
            pred: arena.tensor(dtype, &[b, predicted, e]),
        }
    }
}

/// Gradients on their way through one stack of blocks, used by each block in turn.
#[derive(Debug)]
pub struct StackScratch {
    /// `(B, T, D)`: gradient of the residual stream.
    pub grad_stream: Tensor,
    /// `(B, T, D)`: gradient of a branch's input or output.
    pub grad_branch: Tensor,
    /// `(B, T, 3 D)`.
    pub grad_qkv: Tensor,
    /// `(B, T, F)`.
    pub grad_hidden: Tensor,
}

impl StackScratch {
    fn new(arena: &mut Arena, dtype: DType, [b, t, d]: [usize; 3], f: usize) -> Self {
        Self {
            grad_stream: arena.tensor(dtype, &[b, t, d]),
            grad_branch: arena.tensor(dtype, &[b, t, d]),
            grad_qkv: arena.tensor(dtype, &[b, t, 3 * d]),
            grad_hidden: arena.tensor(dtype, &[b, t, f]),
        }
    }
}

/// What a backward pass needs beside the activations.
#[derive(Debug)]
pub struct Scratch {
    /// `(B, predicted, E)`: written by the loss.
    pub grad_pred: Tensor,
    /// `(B, predicted, Dd)`.
    pub grad_decoded: Tensor,
    /// The decoder's blocks.
    pub decoder: StackScratch,
    /// `(B (1 + K) + L, Dd)`: gradient of the decoder's rows.
    pub grad_decoder_rows: Tensor,
    /// The encoder's blocks.
    pub encoder: StackScratch,
}

impl Scratch {
    /// Carves the scratch of `batch` out of an arena.
    #[must_use]
    pub fn new(arena: &mut Arena, dtype: DType, config: &MaeConfig, batch: Batch) -> Self {
        let Batch { images: b, kept, predicted } = batch;
        let MaeConfig { dim, decoder_dim, mlp_ratio, .. } = *config;
        let long = 1 + config.patches();
        Self {
            grad_pred: arena.tensor(dtype, &[b, predicted, config.patch_numbers()]),
            grad_decoded: arena.tensor(dtype, &[b, predicted, decoder_dim]),
            decoder: StackScratch::new(
                arena,
                dtype,
                [b, long, decoder_dim],
                mlp_ratio * decoder_dim,
            ),
            grad_decoder_rows: arena.tensor(dtype, &[b * (1 + kept) + long - 1, decoder_dim]),
            encoder: StackScratch::new(arena, dtype, [b, 1 + kept, dim], mlp_ratio * dim),
        }
    }
}

/// Bytes of workspace that a forward and a backward pass need, the loss and the masking included.
#[must_use]
pub fn workspace_bytes(dev: &Device, dtype: DType, config: &MaeConfig, batch: Batch) -> usize {
    let Batch { images, kept, predicted } = batch;
    let widest = config.dim.max(config.decoder_dim);
    let patches = config.patches();
    let needs = [
        random_masking::workspace_bytes(dev, images, patches),
        patch_embed::workspace_bytes(dev, dtype, images, kept, config.dim),
        layer_norm::workspace_bytes(dev, dtype, images, widest),
        attention::workspace_bytes(dev, dtype, images, 1 + patches),
        masked_mse_loss::workspace_bytes(dev, dtype, images * predicted),
    ];
    needs.into_iter().max().unwrap_or(0)
}
