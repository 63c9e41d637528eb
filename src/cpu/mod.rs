//! What the CPU side of the ops shares: the two real types, SIMD dispatch, fixed-order sums, matrix products.
//!
//! Every result is the same for any number of threads: work is cut by the problem's shape, never by the thread
//! count, and sums have a fixed order.

pub(crate) use real::Real;

/// Runs a closure compiled for the widest vectors that this machine has: `simd!(|| ..)`. Only what is inlined into it
/// is, so functions that it calls are marked `#[inline(always)]`, as the macro marks the closure.
macro_rules! simd {
    (|| $work:expr) => {
        $crate::cpu::dispatch(
            #[inline(always)]
            || $work,
        )
    };
}
pub(crate) use simd;

pub mod gemm;
mod real;

/// Behind `simd!`.
#[inline(always)]
pub(crate) fn dispatch<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Lanes of the sums below: wide enough for two AVX-512 registers of f32, and the same on every machine.
const LANES: usize = 32;

/// Sum over `i` of `term` of the `i`-th elements of equally long rows, in a fixed order: 32 interleaved partial
/// sums, then those pairwise.
#[inline(always)]
pub(crate) fn sum<T: Real, const N: usize>(rows: [&[T]; N], term: impl Fn([T; N]) -> T) -> T {
    let n = rows[0].len();
    let rows = rows.map(|row| &row[..n]);
    let mut lanes = [T::ZERO; LANES];
    let whole = n - n % LANES;
    for start in (0..whole).step_by(LANES) {
        let chunks = rows.map(|row| &row[start..start + LANES]);
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum = *sum + term(chunks.map(|chunk| chunk[lane]));
        }
    }
    for i in whole..n {
        lanes[i - whole] = lanes[i - whole] + term(rows.map(|row| row[i]));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = lanes[lane] + lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest value of a row; other values if some are NaN.
#[inline(always)]
pub(crate) fn max<T: Real>(row: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = if x > *lane { x } else { *lane };
    }
    lanes.into_iter().fold(T::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// Adds the rows of `partials`, each as long as `total`, onto `total`, in order.
pub(crate) fn add_rows<T: Real>(total: &mut [T], partials: &[T]) {
    simd!(|| {
        for row in partials.chunks_exact(total.len()) {
            for (sum, &x) in total.iter_mut().zip(row) {
                *sum = *sum + x;
            }
        }
    });
}

/// How many rows of `width` elements make a piece of work worth handing to another thread.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}
