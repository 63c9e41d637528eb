//! What a forward pass keeps for the backward pass, and the gradients that pass between blocks.

use super::MaeConfig;
use crate::ops::{
    add_positions, attention, layer_norm, linear, masked_mse_loss, patch_embed, random_masking,
};
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
    /// Before attention.
    pub before: BeforeAttention,
    /// `(B, NH, T)`.
    pub lse: Tensor,
    /// `(B, T, D)`: attention's mixed values.
    pub mixed: Tensor,
    /// After attention.
    pub after: AfterAttention,
}

/// Kept of what comes before attention, of `R` rows.
#[derive(Debug)]
pub struct BeforeAttention {
    /// `(.., D)`: normalised.
    pub norm: Tensor,
    /// `(..)`.
    pub mean: Tensor,
    /// `(..)`.
    pub rstd: Tensor,
    /// `(.., 3 D)`.
    pub qkv: Tensor,
}

/// Kept of what comes after attention, of `R` rows.
#[derive(Debug)]
pub struct AfterAttention {
    /// `(.., D)`: residual stream after attention.
    pub middle: Tensor,
    /// `(.., D)`: normalised input of the MLP.
    pub norm: Tensor,
    /// `(..)`.
    pub mean: Tensor,
    /// `(..)`.
    pub rstd: Tensor,
    /// `(.., F)`: input of GELU.
    pub pre_gelu: Tensor,
    /// `(.., F)`: output of GELU.
    pub hidden: Tensor,
    /// `(.., D)`: residual stream after the block.
    pub out: Tensor,
}

/// Sizes of a block: of the tokens that attend to each other, and of the rows before and after attention where these are
/// others.
struct BlockSizes {
    tokens: [usize; 2],
    dim: usize,
    heads: usize,
    hidden: usize,
    before: [usize; 2],
    after: [usize; 2],
}

impl BlockActivations {
    fn new(arena: &mut Arena, dtype: DType, sizes: &BlockSizes) -> Self {
        let BlockSizes { tokens: [b, t], dim: d, heads, hidden: f, .. } = *sizes;
        let mut rows = |[b, t]: [usize; 2], width: usize| arena.tensor(dtype, &[b, t, width]);
        let (before, after) = (sizes.before, sizes.after);
        let (norm1, qkv, mixed) = (rows(before, d), rows(before, 3 * d), rows([b, t], d));
        let (middle, norm2, out) = (rows(after, d), rows(after, d), rows(after, d));
        let (pre_gelu, hidden) = (rows(after, f), rows(after, f));
        let mut statistic = |shape: &[usize]| arena.tensor(dtype.wide(), shape);
        Self {
            before: BeforeAttention {
                norm: norm1,
                mean: statistic(&before),
                rstd: statistic(&before),
                qkv,
            },
            lse: statistic(&[b, heads, t]),
            mixed,
            after: AfterAttention {
                middle,
                norm: norm2,
                mean: statistic(&after),
                rstd: statistic(&after),
                pre_gelu,
                hidden,
                out,
            },
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
    /// `(B, 1 + L, 3 Dd)`: queries, keys and values of the first decoder block, in place.
    pub decoder_qkv: Tensor,
    /// Decoder blocks. The first has `decoder_rows` before attention, the last the predicted patches after it.
    pub decoder_blocks: Vec<BlockActivations>,
    /// `(B, predicted, Dd)`: attention's mixed values of the last decoder block, for the predicted patches.
    pub last_mixed: Tensor,
    /// `(B, predicted, Dd)`: the residual stream before the last decoder block, of the predicted patches.
    pub last_stream: Tensor,
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
        let encoder = BlockSizes {
            tokens: [b, short],
            dim,
            heads,
            hidden: mlp_ratio * dim,
            before: [b, short],
            after: [b, short],
        };
        let decoder = |l: usize| BlockSizes {
            tokens: [b, long],
            dim: decoder_dim,
            heads: decoder_heads,
            hidden: mlp_ratio * decoder_dim,
            before: if l == 0 { [1, b * short + patches] } else { [b, long] },
            after: if l + 1 == config.decoder_depth { [b, predicted] } else { [b, long] },
        };
        Self {
            patches: arena.tensor(dtype, &[b, kept, e]),
            ids_keep: arena.tensor(DType::I32, &[b, kept]),
            ids_restore: arena.tensor(DType::I32, &[b, patches]),
            ids_predicted: arena.tensor(DType::I32, &[b, predicted]),
            tokens: arena.tensor(dtype, &[b, short, dim]),
            blocks: (0..config.depth)
                .map(|_| BlockActivations::new(arena, dtype, &encoder))
                .collect(),
            latent: arena.tensor(dtype, &[b, short, dim]),
            latent_mean: arena.tensor(dtype.wide(), &[b, short]),
            latent_rstd: arena.tensor(dtype.wide(), &[b, short]),
            embedded: arena.tensor(dtype, &[b, short, decoder_dim]),
            decoder_rows: arena.tensor(dtype, &[b * short + patches, decoder_dim]),
            decoder_tokens: arena.tensor(dtype, &[b, long, decoder_dim]),
            decoder_qkv: arena.tensor(dtype, &[b, long, 3 * decoder_dim]),
            decoder_blocks: (0..config.decoder_depth)
                .map(|l| BlockActivations::new(arena, dtype, &decoder(l)))
                .collect(),
            last_mixed: arena.tensor(dtype, &[b, predicted, decoder_dim]),
            last_stream: arena.tensor(dtype, &[b, predicted, decoder_dim]),
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
    /// The predicted patches, from the last decoder block's attention on.
    pub predicted: PredictedScratch,
    /// The decoder's blocks.
    pub decoder: StackScratch,
    /// The decoder's rows, before the first decoder block's attention.
    pub rows: RowsScratch,
    /// The encoder's blocks.
    pub encoder: StackScratch,
}

/// Gradients of the predicted patches' rows.
#[derive(Debug)]
pub struct PredictedScratch {
    /// `(B, predicted, Dd)`: gradient of the residual stream.
    pub grad_stream: Tensor,
    /// `(B, predicted, Dd)`: gradient of a branch.
    pub grad_branch: Tensor,
    /// `(B, predicted, F)`.
    pub grad_hidden: Tensor,
}

/// Gradients of the decoder's rows: kept tokens of all images, then the mask token at each position.
#[derive(Debug)]
pub struct RowsScratch {
    /// `(B (1 + K) + L, Dd)`: gradient of the residual stream.
    pub grad_stream: Tensor,
    /// `(B (1 + K) + L, Dd)`: gradient of their normalised values.
    pub grad_norm: Tensor,
    /// `(B (1 + K) + L, 3 Dd)`.
    pub grad_qkv: Tensor,
}

impl Scratch {
    /// Carves the scratch of `batch` out of an arena.
    #[must_use]
    pub fn new(arena: &mut Arena, dtype: DType, config: &MaeConfig, batch: Batch) -> Self {
        let Batch { images: b, kept, predicted } = batch;
        let MaeConfig { dim, decoder_dim, mlp_ratio, .. } = *config;
        let (patches, hidden) = (config.patches(), mlp_ratio * decoder_dim);
        let rows = b * (1 + kept) + patches;
        Self {
            grad_pred: arena.tensor(dtype, &[b, predicted, config.patch_numbers()]),
            predicted: PredictedScratch {
                grad_stream: arena.tensor(dtype, &[b, predicted, decoder_dim]),
                grad_branch: arena.tensor(dtype, &[b, predicted, decoder_dim]),
                grad_hidden: arena.tensor(dtype, &[b, predicted, hidden]),
            },
            decoder: StackScratch::new(arena, dtype, [b, 1 + patches, decoder_dim], hidden),
            rows: RowsScratch {
                grad_stream: arena.tensor(dtype, &[rows, decoder_dim]),
                grad_norm: arena.tensor(dtype, &[rows, decoder_dim]),
                grad_qkv: arena.tensor(dtype, &[rows, 3 * decoder_dim]),
            },
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
    let heads = config.heads.max(config.decoder_heads);
    let rows = images * (1 + patches) + patches;
    let needs = [
        random_masking::workspace_bytes(dev, images, patches),
        patch_embed::workspace_bytes(dev, dtype, images, kept, config.dim),
        layer_norm::workspace_bytes(dev, dtype, rows, widest),
        attention::workspace_bytes(dev, dtype, images, 1 + patches, heads),
        add_positions::workspace_bytes(dev, patches, config.decoder_dim),
        masked_mse_loss::workspace_bytes(dev, dtype, images * predicted),
        linear::workspace_bytes(dev, rows, config.mlp_ratio * widest),
        linear::workspace_bytes(dev, images * predicted, config.patch_numbers()),
    ];
    needs.into_iter().max().unwrap_or(0)
}
