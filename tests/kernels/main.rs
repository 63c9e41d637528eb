//! Every op on a GPU: against the f64 CPU side, bit-equal under any schedule, inside its memory.
//!
//! The GPU is the host executor (`docs/executor.md`), which runs the same kernels and checks their every access; with
//! `PIXMIM_TEST_DEVICE=cuda` it is a real one.

#![expect(clippy::unwrap_used, reason = "a call that should succeed and does not is a failed test")]
#![cfg(pixmim_simt)]

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
mod resize;
mod restore_tokens;
