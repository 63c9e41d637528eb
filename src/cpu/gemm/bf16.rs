//! Products of f32 matrices rounded to bf16, summed in f32.
//!
//! Idea     the operands are packed, rounded on the way, into panels whose inner index is a pair of neighbours
//!          along `k`: one 32-bit word holds two bf16, which is what `vdpbf16ps` multiplies. The kernel keeps an
//!          8 x 48 tile of the result in 24 registers and runs over `k`: 11 loads for 24 multiplications.
//! Blocks   256 of `k` at a time: a 48-wide panel of the right operand (24 KiB) stays in L1, a block of the
//!          left one in L2.
//! Order    each element is summed over `k` in pairs, in blocks of 256; blocks of rows go to threads. Neither
//!          depends on the thread count, and edges run the same kernel on zero padding.
//! Source   the loop nest is that of Goto and van de Geijn 2008, "Anatomy of high-performance matrix
//!          multiplication".

#[cfg(target_arch = "x86_64")]
mod avx512;

use rayon::prelude::*;

use super::{Mat, MatMut, assert_conform};

/// Rows of a tile.
const MR: usize = 8;
/// Columns of a tile: three vectors of 16.
const NR: usize = 48;
/// Elements of `k` in a block; even.
const KC: usize = 256;
/// Rows of a block of the left operand: 60 tiles, 240 KiB packed.
const MC: usize = 60 * MR;
/// Columns of a block of the right operand: 2 MiB packed, shared by all threads.
const NC: usize = 86 * NR;

/// The routines that differ between machines.
#[derive(Clone, Copy)]
struct Routines {
    tile: fn(tile: Tile<'_>, pairs: usize, lhs: &[u32], rhs: &[u32], accumulate: bool),
    pack_along: fn(panel: &mut [u32], width: usize, lines: Lines<'_>),
    pack_across: fn(packed: &mut [u32], width: usize, pairs: usize, lines: Lines<'_>),
}

const PORTABLE: Routines = Routines { tile, pack_along, pack_across };

/// Where the product of two panels goes: `MR x NR` elements, rows `stride` apart.
struct Tile<'a> {
    out: &'a mut [f32],
    stride: usize,
}

/// `count` lines of a matrix, `stride` apart, and `depth` elements along `k`: of each line, or `depth` lines.
#[derive(Clone, Copy)]
struct Lines<'a> {
    data: &'a [f32],
    stride: usize,
    count: usize,
    depth: usize,
}

/// Whether this machine multiplies pairs of bf16 in one instruction.
pub(crate) fn is_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `dst = lhs rhs`, or with `accumulate` `dst += lhs rhs`.
pub(crate) fn matmul(
    dst: MatMut<'_, f32>,
    lhs: Mat<'_, f32>,
    rhs: Mat<'_, f32>,
    accumulate: bool,
    threaded: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if is_native() {
        return blocked(avx512::ROUTINES, dst, lhs, rhs, accumulate, threaded);
    }
    blocked(PORTABLE, dst, lhs, rhs, accumulate, threaded);
}

/// Words that start a cache line, as every row of a packed right operand then does: a vector never spans two lines.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

thread_local! {
    /// Packed panels, kept between calls. Taken out while in use: a thread that waits may start another product.
    static PACKED_LHS: std::cell::Cell<Vec<Line>> = const { std::cell::Cell::new(Vec::new()) };
    static PACKED_RHS: std::cell::Cell<Vec<Line>> = const { std::cell::Cell::new(Vec::new()) };
}

/// Lends a buffer of `len` words from `cell`, with whatever it holds.
fn with_buffer<R>(
    cell: &'static std::thread::LocalKey<std::cell::Cell<Vec<Line>>>,
    len: usize,
    work: impl FnOnce(&mut [u32]) -> R,
) -> R {
    let mut buffer = cell.take();
    if buffer.len() < len.div_ceil(16) {
        buffer.resize(len.div_ceil(16), Line::default());
    }
    let result = work(&mut bytemuck::cast_slice_mut(&mut buffer)[..len]);
    cell.set(buffer);
    result
}

fn blocked(
    routines: Routines,
    dst: MatMut<'_, f32>,
    lhs: Mat<'_, f32>,
    rhs: Mat<'_, f32>,
    accumulate: bool,
    threaded: bool,
) {
    assert_conform(&dst, &lhs, &rhs);
    let MatMut { data, rows, cols, row_stride } = dst;
    let depth = lhs.cols;
    // Rows of a block: few enough that every thread gets some, the same number for each as near as tiles allow.
    let threads = if threaded { rayon::current_num_threads() } else { 1 };
    let shares = rows.div_ceil(MC).next_multiple_of(threads);
    let block_rows = rows.div_ceil(shares).next_multiple_of(MR);
    for col in (0..cols).step_by(NC) {
        let block_cols = NC.min(cols - col);
        for k in (0..depth).step_by(KC) {
            let pairs = KC.min(depth - k).div_ceil(2);
            let accumulate = accumulate || k > 0;
            let panels = block_cols.div_ceil(NR);
            with_buffer(&PACKED_RHS, panels * pairs * NR, |packed_rhs| {
                let share = panels.div_ceil(threads) * NR;
                let pack_share = |(j, packed): (usize, &mut [u32])| {
                    let first = col + j * share;
                    let count = share.min(col + block_cols - first);
                    pack::<NR>(routines, packed, rhs.t(), first..first + count, k, pairs);
                };
                if threaded {
                    packed_rhs.par_chunks_mut(share * pairs).enumerate().for_each(pack_share);
                } else {
                    packed_rhs.chunks_mut(share * pairs).enumerate().for_each(pack_share);
                }
                let packed_rhs = &*packed_rhs;
                let multiply = |(i, dst_rows): (usize, &mut [f32])| {
                    let row = i * block_rows;
                    let count = block_rows.min(rows - row);
                    with_buffer(&PACKED_LHS, count.div_ceil(MR) * pairs * MR, |packed_lhs| {
                        pack::<MR>(routines, packed_lhs, lhs, row..row + count, k, pairs);
                        let block = Block { rows: count, cols: col..col + block_cols, row_stride };
                        let panels = Panels { pairs, lhs: packed_lhs, rhs: packed_rhs };
                        block.multiply(routines, dst_rows, panels, accumulate);
                    });
                };
                if threaded {
                    data.par_chunks_mut(block_rows * row_stride).enumerate().for_each(multiply);
                } else {
                    data.chunks_mut(block_rows * row_stride).enumerate().for_each(multiply);
                }
            });
        }
    }
}

/// Packed operands of a block.
#[derive(Clone, Copy)]
struct Panels<'a> {
    pairs: usize,
    lhs: &'a [u32],
    rhs: &'a [u32],
}

/// The part of the result that one task works on.
struct Block {
    rows: usize,
    cols: std::ops::Range<usize>,
    row_stride: usize,
}

impl Block {
    /// Runs the kernel on every tile of the block. `dst` starts at the block's first row.
    fn multiply(&self, routines: Routines, dst: &mut [f32], panels: Panels<'_>, accumulate: bool) {
        let Panels { pairs, lhs, rhs } = panels;
        let stride = self.row_stride;
        for (rhs, col) in rhs.chunks(pairs * NR).zip(self.cols.clone().step_by(NR)) {
            let width = NR.min(self.cols.end - col);
            for (lhs, row) in lhs.chunks(pairs * MR).zip((0..self.rows).step_by(MR)) {
                let height = MR.min(self.rows - row);
                let out = &mut dst[row * stride + col..][..(height - 1) * stride + width];
                if (height, width) == (MR, NR) {
                    (routines.tile)(Tile { out, stride }, pairs, lhs, rhs, accumulate);
                    continue;
                }
                // An edge: the whole tile goes aside, and what is inside is taken from it.
                let mut aside = [0.0; MR * NR];
                let whole = Tile { out: &mut aside, stride: NR };
                (routines.tile)(whole, pairs, lhs, rhs, false);
                for (out, sums) in out.chunks_mut(stride).zip(aside.chunks(NR)) {
                    for (out, sum) in out.iter_mut().zip(&sums[..width]) {
                        *out = if accumulate { *out + sum } else { *sum };
                    }
                }
            }
        }
    }
}

/// A value rounded to bf16 (to nearest, ties to even; NaN stays NaN), in the high half of the word.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    (if x.is_nan() { bits | 0x0040_0000 } else { nearest }) & 0xffff_0000
}

/// Two neighbours along `k` as one word, the first in the low half.
#[inline(always)]
fn word(first: f32, second: f32) -> u32 {
    rounded(first) >> 16 | rounded(second)
}

/// Packs the rows `range` of `mat` from column `k` on: panels of `W` rows, each `pairs` rows of `W` words, with zeros
/// beyond the matrix.
fn pack<const W: usize>(
    routines: Routines,
    packed: &mut [u32],
    mat: Mat<'_, f32>,
    range: std::ops::Range<usize>,
    k: usize,
    pairs: usize,
) {
    let (count, depth) = (range.len(), (mat.cols - k).min(2 * pairs));
    let data = &mat.data[range.start * mat.row_stride + k * mat.col_stride..];
    if count % W > 0 {
        // The last panel has columns that no row fills.
        packed[count / W * pairs * W..].fill(0);
    }
    if mat.col_stride == 1 {
        for (panel, row) in packed.chunks_mut(pairs * W).zip((0..count).step_by(W)) {
            let (data, stride) = (&data[row * mat.row_stride..], mat.row_stride);
            let lines = Lines { data, stride, count: W.min(count - row), depth };
            (routines.pack_along)(panel, W, lines);
        }
    } else {
        let lines = Lines { data, stride: mat.col_stride, count, depth };
        (routines.pack_across)(packed, W, pairs, lines);
    }
}

/// Packs rows whose lines lie along `k` into one panel, `width` words wide.
fn pack_along(panel: &mut [u32], width: usize, lines: Lines<'_>) {
    for r in 0..lines.count {
        let line = &lines.data[r * lines.stride..][..lines.depth];
        for (out, pair) in panel[r..].iter_mut().step_by(width).zip(line.chunks(2)) {
            *out = word(pair[0], pair.get(1).copied().unwrap_or(0.0));
        }
    }
}

/// Packs rows whose lines lie across `k` into panels `width` words wide: two lines at a time are read from end to end
/// and dealt out to the panels.
fn pack_across(packed: &mut [u32], width: usize, pairs: usize, lines: Lines<'_>) {
    let Lines { data, stride, count, depth } = lines;
    for p in 0..depth.div_ceil(2) {
        let first = &data[2 * p * stride..][..count];
        let second = (2 * p + 1 < depth).then(|| &data[(2 * p + 1) * stride..][..count]);
        for (r, &a) in first.iter().enumerate() {
            let b = second.map_or(0.0, |second| second[r]);
            packed[r / width * pairs * width + p * width + r % width] = word(a, b);
        }
    }
}

/// The kernel for machines without bf16 instructions: the same numbers up to the order of the two sums in a pair.
fn tile(tile: Tile<'_>, pairs: usize, lhs: &[u32], rhs: &[u32], accumulate: bool) {
    let first = |word: u32| f32::from_bits(word << 16);
    let second = |word: u32| f32::from_bits(word & 0xffff_0000);
    simd!(|| {
        let mut all = [[0.0; NR]; MR];
        for (a, b) in lhs.chunks_exact(MR).zip(rhs.chunks_exact(NR)).take(pairs) {
            for (sums, &a) in all.iter_mut().zip(a) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum += first(a) * first(b) + second(a) * second(b);
                }
            }
        }
        for (out, sums) in tile.out.chunks_mut(tile.stride).zip(all) {
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = if accumulate { *out + sum } else { sum };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    fn random(n: usize, sample: u64) -> Vec<f32> {
        let stream = Stream::new(5, 0, sample, Purpose::Init);
        (0..n as u32).map(|i| stream.uniform(i) as f32 - 0.5).collect()
    }

    /// The product of the rounded operands in f64.
    fn oracle(
        m: usize,
        n: usize,
        k: usize,
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Vec<f64> {
        let round = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
        (0..m * n)
            .map(|at| (0..k).map(|p| round(a(at / n, p)) * round(b(p, at % n))).sum())
            .collect()
    }

    #[test]
    fn equals_the_product_of_the_rounded_operands() {
        for (m, n, k) in
            [(1, 1, 1), (8, 48, 256), (9, 49, 257), (5, 70, 3), (97, 31, 600), (500, 7, 20)]
        {
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            let at = |i: usize, p: usize| a[p * m + i];
            let bt = |p: usize, j: usize| b[j * k + p];
            let plain = (Mat::new(&a, m, k), Mat::new(&b, k, n));
            let turned = (Mat::new(&a, k, m).t(), Mat::new(&b, n, k).t());
            let wants = [
                oracle(m, n, k, |i, p| a[i * k + p], |p, j| b[p * n + j]),
                oracle(m, n, k, at, bt),
            ];
            for ((lhs, rhs), want) in [plain, turned].into_iter().zip(wants) {
                for routines in [PORTABLE].into_iter().chain(native()) {
                    let stride = n + 3;
                    let mut out = vec![f32::NAN; m * stride];
                    blocked(
                        routines,
                        MatMut::strided(&mut out, m, n, stride),
                        lhs,
                        rhs,
                        false,
                        true,
                    );
                    blocked(
                        routines,
                        MatMut::strided(&mut out, m, n, stride),
                        lhs,
                        rhs,
                        true,
                        false,
                    );
                    for (i, want) in want.iter().enumerate() {
                        let got = f64::from(out[i / n * stride + i % n]);
                        let err = (got - 2.0 * want).abs();
                        assert!(
                            err <= 1e-6 * (k as f64).sqrt(),
                            "{m}x{n}x{k} at {i}: {got} {want}"
                        );
                    }
                    let gaps = (0..m).flat_map(|i| &out[i * stride + n..(i + 1) * stride]);
                    assert!(gaps.copied().all(f32::is_nan), "the gap between rows is left alone");
                }
            }
        }
    }

    fn native() -> Option<Routines> {
        #[cfg(target_arch = "x86_64")]
        return is_native().then_some(avx512::ROUTINES);
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    #[test]
    fn rounds_as_half_does() {
        let specials = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, 1e-40];
        for x in random(10_000, 3).into_iter().chain(specials) {
            assert_eq!(rounded(x) >> 16, u32::from(half::bf16::from_f32(x).to_bits()), "{x}");
        }
    }
}
