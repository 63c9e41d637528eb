//! What a forward and a backward pass of the network must move and compute, op by op as [`super::mae`] calls them.

use super::MaeConfig;
use super::activations::Batch;
use crate::DType;
use crate::ops::cost::{self, Cost};

/// Of [`Mae::forward`](super::Mae::forward) and [`Mae::backward`](super::Mae::backward) together.
#[must_use]
pub fn forward_backward(config: &MaeConfig, batch: Batch, dtype: DType) -> Cost {
    let Batch { images, kept, predicted } = batch;
    let (l, e) = (config.patches(), config.patch_numbers());
    let (dim, decoder_dim) = (config.dim, config.decoder_dim);
    let encoder = Stack { dtype, dim, heads: config.heads, mlp_ratio: config.mlp_ratio };
    let decoder = Stack { dim: decoder_dim, heads: config.decoder_heads, ..encoder };
    let (short, long) = (images * (1 + kept), images * (1 + l));
    // All blocks of the decoder but the first start from all tokens, all but the last end with them.
    let others = config.decoder_depth - 1;

    let mut passes = vec![
        cost::patch_embed_forward(dtype, [images, l, kept, e, dim]),
        cost::patch_embed_backward(dtype, [images, kept, e, dim]),
        (encoder.project(short) + encoder.attention(images, 1 + kept) + encoder.mix(short))
            * config.depth,
        encoder.norm(short),
        encoder.linear([short, dim, decoder_dim], Around::Nothing),
        cost::add_positions_forward(dtype, [images, l, kept, decoder_dim]),
        cost::add_positions_backward(dtype, [l, decoder_dim]),
        decoder.project(short + l) + decoder.project(long) * others,
        decoder.attention(images, 1 + l) * config.decoder_depth,
        decoder.mix(long) * others + decoder.mix(images * predicted),
        decoder.norm(images * predicted),
        decoder.linear([images * predicted, decoder_dim, e], Around::Nothing),
    ];
    for width in [decoder_dim, 3 * decoder_dim] {
        passes.push(cost::restore_tokens_forward(dtype, [images, l, kept, width]));
        passes.push(cost::restore_tokens_backward(dtype, [images, l, kept, width]));
    }
    // The residual stream and the mixed values.
    passes.push(cost::gather_tokens_forward(dtype, [images, predicted, decoder_dim]) * 2);
    passes.push(cost::gather_tokens_backward(dtype, [images, l, predicted, decoder_dim]) * 2);
    passes.into_iter().sum()
}

/// The blocks of the encoder or of the decoder.
#[derive(Clone, Copy)]
struct Stack {
    dtype: DType,
    dim: usize,
    heads: usize,
    mlp_ratio: usize,
}

/// What a linear layer does besides its products.
#[derive(Clone, Copy, PartialEq)]
enum Around {
    Nothing,
    /// Keeps GELU's input.
    GeluAfter,
    /// Adds a residual.
    Residual,
    /// Adds a residual; its input's gradient goes through GELU.
    GeluBeforeAndResidual,
}

impl Stack {
    /// Norm, queries, keys and values of so many rows.
    fn project(self, rows: usize) -> Cost {
        self.norm(rows) + self.linear([rows, self.dim, 3 * self.dim], Around::Nothing)
    }

    fn attention(self, images: usize, tokens: usize) -> Cost {
        let shape = [images, tokens, self.heads, self.dim];
        cost::attention_forward(self.dtype, shape) + cost::attention_backward(self.dtype, shape)
    }

    /// What follows attention, for so many rows.
    fn mix(self, rows: usize) -> Cost {
        let hidden = self.mlp_ratio * self.dim;
        self.linear([rows, self.dim, self.dim], Around::Residual)
            + self.norm(rows)
            + self.linear([rows, self.dim, hidden], Around::GeluAfter)
            + self.linear([rows, hidden, self.dim], Around::GeluBeforeAndResidual)
    }

    fn norm(self, rows: usize) -> Cost {
        let shape = [rows, self.dim];
        cost::layer_norm_forward(self.dtype, shape) + cost::layer_norm_backward(self.dtype, shape)
    }

    fn linear(self, shape: [usize; 3], around: Around) -> Cost {
        let epilogue = around != Around::Nothing;
        let gelu = around == Around::GeluBeforeAndResidual;
        cost::linear_forward(self.dtype, shape, epilogue)
            + cost::linear_backward(self.dtype, shape, gelu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_has_six_operations_for_each_row_and_weight_and_fourteen_for_attention() {
        let config = MaeConfig {
            image_size: 12,
            patch_size: 4,
            dim: 20,
            depth: 3,
            heads: 5,
            decoder_dim: 12,
            decoder_depth: 2,
            decoder_heads: 3,
            mlp_ratio: 2,
        };
        // 9 patches of 48 numbers.
        let batch = Batch { images: 7, kept: 2, predicted: 7 };
        // Of a block by width: queries, keys, values; projection and two layers of the MLP.
        let (before, after) = (|d: u64| 3 * d * d, |d: u64| d * d + 2 * 2 * d * d);
        let encoder = 3 * 21 * (before(20) + after(20)) + 21 * 20 * 12;
        // 21 kept rows and one for each patch, then all 70; all 70, then 49 predicted ones.
        let decoder = (30 + 70) * before(12) + (70 + 49) * after(12) + 49 * 12 * 48;
        let attention = 7 * (3 * 3 * 3 * 20 + 2 * 10 * 10 * 12);
        // The patches need no gradient.
        let patches = 7 * 2 * 48 * 20;
        let found = forward_backward(&config, batch, DType::F32).flops;
        assert_eq!(found, 6 * (encoder + decoder) + 14 * attention + 4 * patches);
    }

    #[test]
    fn bytes_halve_in_bf16_but_for_statistics_and_gradients_of_parameters() {
        let batch = Batch { images: 64, kept: 49, predicted: 147 };
        let bytes =
            |dtype| forward_backward(&MaeConfig::VIT_BASE_PATCH16, batch, dtype).bytes as f64;
        let ratio = bytes(DType::Bf16) / bytes(DType::F32);
        assert!(0.5 < ratio && ratio < 0.56, "{ratio}");
    }
}
