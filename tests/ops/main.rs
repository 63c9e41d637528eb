//! Each op against golden values, an independent naive formula, finite differences, and misuse.
//!
//! The chain of trust: golden values show that the f64 op means what MAE and PixMIM mean, finite differences show that
//! its backward pass belongs to its forward pass, and f32 is compared with f64.

#![expect(clippy::unwrap_used, reason = "a call that should succeed and does not is a failed test")]

mod adamw;
mod add_positions;
mod attention;
mod cast;
mod common;
mod gather_tokens;
mod gelu;
mod grad_norm;
mod input;
mod layer_norm;
mod linear;
mod low_freq_target;
mod masked_mse_loss;
mod patch_embed;
mod random_masking;
mod refusal;
mod resize;
mod restore_tokens;
