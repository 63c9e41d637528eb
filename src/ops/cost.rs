//! What an op must do: bytes to move and operations to compute, one function for each op and direction.
//!
//! Useful work only, whatever a kernel does besides. Bytes: each tensor is read or written once, one that accumulates
//! both, workspaces and single numbers not at all. Operations: those of matrix products, two for a multiplication and
//! its addition, nothing for padding. Arithmetic on one number at a time (a norm, GELU, softmax) is left out, as is
//! usual: it is never what an op waits for.
//!
//! [`Cost::share`] sets a measured time against the roofs of a device (Williams et al. 2009, "Roofline"). Shapes are
//! arrays in the order of their documented letters, which are those of [`super`].

use std::iter::Sum;
use std::ops::{Add, Mul};
use std::time::Duration;

use super::low_freq_target;
use crate::DType;

/// Useful work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that are read or written.
    pub bytes: u64,
    /// Floating-point operations of products.
    pub flops: u64,
}

/// What a device reaches, as measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Bytes that a copy reads and writes, in a second.
    pub bytes_per_second: f64,
    /// Operations of a large product in the precision in question, in a second.
    pub flops_per_second: f64,
}

/// What an op would wait for if nothing else took time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Roof {
    /// Its tensors.
    Memory,
    /// Its products.
    Compute,
}

impl Cost {
    /// The nearer roof: that of the longer time.
    #[must_use]
    pub fn roof(self, peaks: Peaks) -> Roof {
        let [memory, compute] = self.least_seconds(peaks);
        if compute > memory { Roof::Compute } else { Roof::Memory }
    }

    /// Share of the nearer roof that work done in this time reached: 1 is as fast as the measured peak.
    #[must_use]
    pub fn share(self, peaks: Peaks, took: Duration) -> f64 {
        let [memory, compute] = self.least_seconds(peaks);
        memory.max(compute) / took.as_secs_f64()
    }

    /// Seconds that the bytes and the operations take at the peaks.
    fn least_seconds(self, peaks: Peaks) -> [f64; 2] {
        [self.bytes as f64 / peaks.bytes_per_second, self.flops as f64 / peaks.flops_per_second]
    }

    /// So many elements of a dtype, moved once.
    fn moves(dtype: DType, elems: usize) -> Self {
        Self { bytes: (elems * dtype.size_bytes()) as u64, flops: 0 }
    }

    /// A product of `rows x inner` with `inner x cols`.
    fn product(rows: usize, inner: usize, cols: usize) -> Self {
        Self { bytes: 0, flops: 2 * rows as u64 * inner as u64 * cols as u64 }
    }
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, flops: self.flops + other.flops }
    }
}

impl Mul<usize> for Cost {
    type Output = Self;

    fn mul(self, times: usize) -> Self {
        Self { bytes: self.bytes * times as u64, flops: self.flops * times as u64 }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}

/// Of [`random_masking::forward`](super::random_masking::forward), `[B, L]`, noise drawn.
#[must_use]
pub fn random_masking_forward([b, l]: [usize; 2]) -> Cost {
    // Sample ids; kept and masked patches, which are all; where each one stands.
    Cost::moves(DType::I64, b) + Cost::moves(DType::I32, 2 * b * l)
}

/// Of [`resize::forward`](super::resize::forward), `[B, S]`, from rectangles of so many pixels together. Its sums are of
/// bytes, on no unit that the operations of [`Cost`] are of.
#[must_use]
pub fn resize_forward([b, s]: [usize; 2], pixels: usize) -> Cost {
    let geometry = Cost::moves(DType::I64, b * super::input::GEOMETRY_FIELDS);
    Cost::moves(DType::U8, 3 * pixels + 3 * b * s * s) + geometry
}

/// Where [`input_forward`] writes what the loss will compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputTarget {
    /// All pixels, in this dtype.
    Filtered(DType),
    /// The masked patches.
    Raw,
}

/// Of [`input::forward`](super::input::forward), `[B, S, P, K]`. Of the images it needs the crops.
#[must_use]
pub fn input_forward(dtype: DType, [b, s, p, k]: [usize; 4], target: InputTarget) -> Cost {
    let (l, e) = ((s / p).pow(2), 3 * p * p);
    let geometry = Cost::moves(DType::I64, b * super::input::GEOMETRY_FIELDS);
    let target = match target {
        InputTarget::Filtered(pixels) => Cost::moves(pixels, b * l * e),
        InputTarget::Raw => {
            Cost::moves(dtype.wide(), b * (l - k) * e) + Cost::moves(DType::I32, b * (l - k))
        }
    };
    Cost::moves(DType::U8, b * l * e)
        + geometry
        + Cost::moves(DType::I32, b * k)
        + Cost::moves(dtype, b * k * e)
        + target
}

/// Of [`low_freq_target::forward`], `[B, S, P, K]`, with pixels and target of these dtypes.
/// Its products are truncated transforms over the `n` frequencies of an axis of which a bin is kept: of real rows, of
/// complex columns, back over the columns, and back over the rows of the pixels in masked patches.
#[must_use]
pub fn low_freq_target_forward(
    [pixels, target]: [DType; 2],
    [b, s, p, k]: [usize; 4],
    radius: f64,
) -> Cost {
    let (l, e) = ((s / p).pow(2), 3 * p * p);
    let (n, masked) = (low_freq_target::frequencies(s, radius).len(), b * (l - k));
    let rows = Cost::product(s, s, 2 * n);
    let columns = Cost::product(2 * n, 2 * s, n);
    Cost::moves(pixels, 3 * b * s * s)
        + Cost::moves(target, masked * e)
        + Cost::moves(DType::I32, masked)
        + (rows + columns * 2) * (3 * b)
        + Cost::product(masked * e, 2 * n, 2)
}

/// Of [`patch_embed::forward`](super::patch_embed::forward), `[B, L, K, E, D]`.
#[must_use]
pub fn patch_embed_forward(dtype: DType, [b, l, k, e, d]: [usize; 5]) -> Cost {
    let read = b * k * e + d * e + 2 * d + (1 + l) * d;
    Cost::moves(dtype, read + b * (1 + k) * d)
        + Cost::moves(DType::I32, b * k)
        + Cost::product(b * k, e, d)
}

/// Of [`patch_embed::backward`](super::patch_embed::backward), `[B, K, E, D]`.
#[must_use]
pub fn patch_embed_backward(dtype: DType, [b, k, e, d]: [usize; 4]) -> Cost {
    Cost::moves(dtype, b * k * e + b * (1 + k) * d)
        + Cost::moves(dtype.wide(), 2 * (d * e + 2 * d))
        + Cost::product(d, b * k, e)
}

/// Of [`layer_norm::forward`](super::layer_norm::forward), `[R, D]`.
#[must_use]
pub fn layer_norm_forward(dtype: DType, [r, d]: [usize; 2]) -> Cost {
    Cost::moves(dtype, 2 * r * d + 2 * d) + Cost::moves(dtype.wide(), 2 * r)
}

/// Of [`layer_norm::backward`](super::layer_norm::backward), `[R, D]`.
#[must_use]
pub fn layer_norm_backward(dtype: DType, [r, d]: [usize; 2]) -> Cost {
    Cost::moves(dtype, 4 * r * d + d) + Cost::moves(dtype.wide(), 2 * r + 4 * d)
}

/// Of [`linear::forward`](super::linear::forward), `[R, K, N]`. An epilogue moves one more tensor: GELU's input, or
/// the residual.
#[must_use]
pub fn linear_forward(dtype: DType, [r, k, n]: [usize; 3], epilogue: bool) -> Cost {
    let out = if epilogue { 2 * r * n } else { r * n };
    Cost::moves(dtype, r * k + n * k + n + out) + Cost::product(r, k, n)
}

/// Of [`linear::backward`](super::linear::backward), `[R, K, N]`, all gradients, the input's through GELU or not.
#[must_use]
pub fn linear_backward(dtype: DType, [r, k, n]: [usize; 3], gelu: bool) -> Cost {
    let pre = if gelu { r * k } else { 0 };
    Cost::moves(dtype, r * n + r * k + n * k + r * k + pre)
        + Cost::moves(dtype.wide(), 2 * (n * k + n))
        + Cost::product(r, n, k)
        + Cost::product(n, r, k)
}

/// As [`linear_backward`], without the input's gradient.
#[must_use]
pub fn linear_backward_parameters(dtype: DType, [r, k, n]: [usize; 3]) -> Cost {
    Cost::moves(dtype, r * n + r * k)
        + Cost::moves(dtype.wide(), 2 * (n * k + n))
        + Cost::product(n, r, k)
}

/// Of [`gelu::forward`](super::gelu::forward) over so many elements.
#[must_use]
pub fn gelu_forward(dtype: DType, elems: usize) -> Cost {
    Cost::moves(dtype, 2 * elems)
}

/// Of [`gelu::backward`](super::gelu::backward) over so many elements.
#[must_use]
pub fn gelu_backward(dtype: DType, elems: usize) -> Cost {
    Cost::moves(dtype, 3 * elems)
}

/// Of [`attention::forward`](super::attention::forward), `[B, T, NH, D]`: logits, and their mix of values.
#[must_use]
pub fn attention_forward(dtype: DType, [b, t, nh, d]: [usize; 4]) -> Cost {
    Cost::moves(dtype, 4 * b * t * d)
        + Cost::moves(dtype.wide(), b * nh * t)
        + Cost::product(t, d, t) * (2 * b)
}

/// Of [`attention::backward`](super::attention::backward), `[B, T, NH, D]`: four gradients, and the logits anew, as
/// `T x T` numbers of each head are kept by nobody.
#[must_use]
pub fn attention_backward(dtype: DType, [b, t, nh, d]: [usize; 4]) -> Cost {
    Cost::moves(dtype, 8 * b * t * d)
        + Cost::moves(dtype.wide(), b * nh * t)
        + Cost::product(t, d, t) * (5 * b)
}

/// Of [`add_positions::forward`](super::add_positions::forward), `[B, L, K, D]`.
#[must_use]
pub fn add_positions_forward(dtype: DType, [b, l, k, d]: [usize; 4]) -> Cost {
    let read = b * (1 + k) + 1 + (1 + l);
    let written = b * (1 + k) + l;
    Cost::moves(dtype, (read + written) * d) + Cost::moves(DType::I32, b * k)
}

/// Of [`add_positions::backward`](super::add_positions::backward), `[L, D]`.
#[must_use]
pub fn add_positions_backward(dtype: DType, [l, d]: [usize; 2]) -> Cost {
    Cost::moves(dtype, l * d) + Cost::moves(dtype.wide(), 2 * d)
}

/// Of [`restore_tokens::forward`](super::restore_tokens::forward), `[B, L, K, W]`.
#[must_use]
pub fn restore_tokens_forward(dtype: DType, [b, l, k, w]: [usize; 4]) -> Cost {
    Cost::moves(dtype, (b * (1 + k) + l + b * (1 + l)) * w) + Cost::moves(DType::I32, b * l)
}

/// Of [`restore_tokens::backward`](super::restore_tokens::backward), `[B, L, K, W]`: what forward moves, the other
/// way.
#[must_use]
pub fn restore_tokens_backward(dtype: DType, shape: [usize; 4]) -> Cost {
    restore_tokens_forward(dtype, shape)
}

/// Of [`gather_tokens::forward`](super::gather_tokens::forward), `[B, M, D]`. Of the tokens it needs the gathered
/// ones.
#[must_use]
pub fn gather_tokens_forward(dtype: DType, [b, m, d]: [usize; 3]) -> Cost {
    Cost::moves(dtype, 2 * b * m * d) + Cost::moves(DType::I32, b * m)
}

/// Of [`gather_tokens::backward`](super::gather_tokens::backward), `[B, L, M, D]`.
#[must_use]
pub fn gather_tokens_backward(dtype: DType, [b, l, m, d]: [usize; 4]) -> Cost {
    Cost::moves(dtype, b * (m + 1 + l) * d) + Cost::moves(DType::I32, b * l)
}

/// Of [`masked_mse_loss::forward_backward`](super::masked_mse_loss::forward_backward), `[B, M, E]`.
#[must_use]
pub fn masked_mse_loss_forward_backward(dtype: DType, [b, m, e]: [usize; 3]) -> Cost {
    Cost::moves(dtype, 2 * b * m * e) + Cost::moves(dtype.wide(), b * m * e)
}

/// Of [`grad_norm::forward`](super::grad_norm::forward) over so many elements.
#[must_use]
pub fn grad_norm_forward(dtype: DType, elems: usize) -> Cost {
    Cost::moves(dtype, elems)
}

/// Of [`adamw::update`](super::adamw::update) of so many parameters, with a rounded copy in the second dtype or none.
/// Parameters and moments are read and written, gradients read.
#[must_use]
pub fn adamw_update(dtype: DType, elems: usize, copy: Option<DType>) -> Cost {
    let copy = copy.map_or(Cost::default(), |copy| Cost::moves(copy, elems));
    Cost::moves(dtype, 7 * elems) + copy
}

/// Of [`cast::forward`](super::cast::forward) of so many elements.
#[must_use]
pub fn cast_forward([from, to]: [DType; 2], elems: usize) -> Cost {
    Cost::moves(from, elems) + Cost::moves(to, elems)
}

#[cfg(test)]
mod tests;
