//! The operations, in the order in which a training step meets them.
//!
//! Each is a free function over views, with one argument struct whose fields say shape and dtype. It checks its
//! arguments, then runs on the device; it never allocates, prints or synchronises. Real tensors of one call share one
//! dtype: f32, or f64 for the oracle.
//!
//! | op | forward | backward |
//! |---|---|---|
//! | [`random_masking`] | noise to ids of kept and masked patches | |
//! | [`resize`] | rectangles of bytes to square crops, antialiased | |
//! | [`input`] | bytes to normalised patches and pixels | |
//! | [`low_freq_target`] | pixels to low-pass filtered target patches | |
//! | [`patch_embed`] | kept patches to encoder tokens | weight, bias, class token |
//! | [`layer_norm`] | rows to normalised rows | input, weight, bias |
//! | [`linear`] | product, bias, GELU, residual | input (times GELU'), weight, bias |
//! | [`gelu`] | stand-alone GELU | input |
//! | [`attention`] | packed queries, keys, values to mixed values | queries, keys, values |
//! | [`add_positions`] | kept tokens and mask tokens to rows with positions | mask token |
//! | [`restore_tokens`] | kept and mask rows to decoder tokens | kept rows, mask rows |
//! | [`gather_tokens`] | decoder tokens to the masked ones | decoder tokens |
//! | [`masked_mse_loss`] | loss and its gradient in one pass | |
//! | [`grad_norm`] | L2 norm of all gradients | |
//! | [`adamw`] | one update of all parameters | |
//! | [`cast`] | between precisions | |
//!
//! Dimension letters: `B` images of a batch, `C` = 3 channels, `S` pixels of a side, `P` pixels of a patch's side,
//! `L` patches of an image, `K` kept and `M = L - K` masked patches, `E = 3 P P` numbers of a patch, `T` tokens
//! (`1 + K` in the encoder, `1 + L` in the decoder), `D` width, `NH` heads, `HD` width of a head, `F` width of the
//! MLP, `R` rows (all leading dimensions as one).
//!
//! Gradients of parameters accumulate, of activations overwrite, of the residual stream accumulate.
//!
//! [`cost`] states what each must move and compute.

pub mod adamw;
pub mod add_positions;
pub mod attention;
pub mod cast;
pub mod cost;
pub mod gather_tokens;
pub mod gelu;
pub mod grad_norm;
pub mod input;
pub mod layer_norm;
pub mod linear;
pub mod low_freq_target;
pub mod masked_mse_loss;
pub mod patch_embed;
pub mod random_masking;
pub mod resize;
pub mod restore_tokens;

/// Runs `$body` with `$T` standing for the Rust type of `$dtype`, which `check` has found to be f32 or f64.
macro_rules! for_real {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            _ => {
                type $T = f32;
                $body
            }
        }
    };
}
use for_real;

use std::ops::{RangeBounds, RangeInclusive};

use crate::device::Call;

/// Refuses sizes of zero.
fn expect_nonzero(call: Call<'_>, arg: &'static str, shape: &[usize]) -> crate::Result<()> {
    if shape.contains(&0) {
        let expected = "no dimension of size 0".into();
        return Err(crate::Error::Shape { op: call.op, arg, expected, found: shape.to_vec() });
    }
    Ok(())
}

/// Refuses rows that a GPU could not read 16 bytes at a time in every dtype.
fn expect_vectors(call: Call<'_>, arg: &'static str, shape: &[usize]) -> crate::Result<()> {
    expect_multiple(call, arg, shape, 8)
}

/// Refuses rows of a number of elements that a GPU's kernels do not take.
fn expect_multiple(
    call: Call<'_>,
    arg: &'static str,
    shape: &[usize],
    of: usize,
) -> crate::Result<()> {
    match (call.dev, shape.last()) {
        (crate::Device::Cuda(_), Some(width)) if !width.is_multiple_of(of) => {
            let expected =
                format!("a last dimension that is a multiple of {of}: a GPU takes no other");
            Err(crate::Error::Shape { op: call.op, arg, expected, found: shape.to_vec() })
        }
        _ => Ok(()),
    }
}

/// How kernels that move rows of tokens are launched: a warp takes a row, a block neighbouring rows of one image, 16 bytes
/// of a row are a chunk. As in `kernels/common/rows.cuh`.
mod rows {
    use crate::DType;

    const ROWS: usize = 4;
    pub(super) const THREADS: u32 = 32 * ROWS as u32;

    /// Blocks of an image of so many rows.
    pub(super) fn blocks(rows: usize) -> usize {
        rows.div_ceil(ROWS)
    }

    /// Chunks of a row, which [`expect_vectors`](super::expect_vectors) has found to be whole.
    pub(super) fn chunks(dtype: DType, width: usize) -> u32 {
        (width * dtype.size_bytes() / 16) as u32
    }
}

/// Numbers of an RGB patch (E = 3 P P). A side whose square overflows is refused: it would pass for a small one.
fn patch_numbers(call: Call<'_>, patch_size: usize) -> crate::Result<usize> {
    let numbers = patch_size.checked_mul(patch_size).and_then(|n| n.checked_mul(3));
    numbers.filter(|&numbers| numbers > 0).ok_or_else(|| {
        crate::Error::invalid(
            format!("{}: patch_size", call.op),
            format!("is {patch_size}, not the pixels of a patch's side"),
        )
    })
}

/// What any number of an op must be: finite in every precision it computes in.
const FINITE: RangeInclusive<f64> = -(f32::MAX as f64)..=f32::MAX as f64;
const NOT_NEGATIVE: RangeInclusive<f64> = 0.0..=f32::MAX as f64;
/// With a finite reciprocal.
const POSITIVE: RangeInclusive<f64> = f32::MIN_POSITIVE as f64..=f32::MAX as f64;

/// Refuses a number outside its range; NaN is outside any.
fn expect_within(
    call: Call<'_>,
    arg: &str,
    value: f64,
    range: impl RangeBounds<f64> + std::fmt::Debug,
) -> crate::Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    let why = format!("is {value:?}, outside {range:?}");
    Err(crate::Error::invalid(format!("{}: {arg}", call.op), why))
}

/// Refuses colours that do not normalise: each mean finite, each standard deviation positive.
fn expect_colours(call: Call<'_>, mean: [f64; 3], std: [f64; 3]) -> crate::Result<()> {
    mean.into_iter().try_for_each(|mean| expect_within(call, "mean", mean, FINITE))?;
    std.into_iter().try_for_each(|std| expect_within(call, "std", std, POSITIVE))
}

/// Refuses ids outside `0..bound`. On a GPU nobody looks: reading them back would stop the stream, so a kernel trusts the
/// ids it is given, as [`random_masking`] makes them.
fn expect_ids(
    call: Call<'_>,
    arg: &str,
    ids: &crate::TensorRef<'_>,
    bound: usize,
) -> crate::Result<()> {
    if ids.place() != crate::Place::Host {
        return Ok(());
    }
    let outside = |&&id: &&i32| usize::try_from(id).map_or(true, |id| id >= bound);
    match ids.as_slice::<i32>().iter().find(outside) {
        None => Ok(()),
        Some(id) => Err(crate::Error::invalid(
            format!("{}: {arg}", call.op),
            format!("holds the id {id}, outside 0..{bound}"),
        )),
    }
}
