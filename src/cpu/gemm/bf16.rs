//! Products of f32 matrices rounded to bf16, summed in f32.
//!
//! Idea     the operands are packed, rounded on the way, into panels whose inner index is a pair of neighbours
//!          along `k`: one 32-bit word holds two bf16, which is what `vdpbf16ps` multiplies. The kernel keeps a
//!          12 x 32 tile of the result in 24 registers and runs over `k`.
//! Blocks   256 of `k` at a time: a 32-wide panel of the right operand (16 KiB) stays in L1, a block of the
//!          left one in L2.
//! Order    each element is summed over `k` in pairs, in blocks of 256; blocks of rows go to threads. Neither
//!          depends on the thread count, and edges run the same kernel on zero padding.
//! Source   the loop nest is that of Goto and van de Geijn 2008, "Anatomy of high-performance matrix
//!          multiplication".

use rayon::prelude::*;

use super::{Mat, MatMut, assert_conform};

/// Rows of a tile.
const MR: usize = 12;
/// Columns of a tile: two vectors of 16.
const NR: usize = 32;
/// Elements of `k` in a block; even.
const KC: usize = 256;
/// Rows of a block of the left operand: 40 tiles, 240 KiB packed.
const MC: usize = 40 * MR;
/// Columns of a block of the right operand: 2 MiB packed, shared by all threads.
const NC: usize = 4096;

type Tile = [[f32; NR]; MR];
/// Adds the product of two panels of `pairs` words a row to a tile.
type Kernel = fn(pairs: usize, lhs: &[u32], rhs: &[u32]) -> Tile;

/// Whether this machine multiplies pairs of bf16 in one instruction.
pub(crate) fn is_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
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
        return blocked(avx512::tile, dst, lhs, rhs, accumulate, threaded);
    }
    blocked(portable_tile, dst, lhs, rhs, accumulate, threaded);
}

thread_local! {
    /// Packed panels, kept between calls. Taken out while in use: a thread that waits may start another product.
    static PACKED_LHS: std::cell::Cell<Vec<u32>> = const { std::cell::Cell::new(Vec::new()) };
    static PACKED_RHS: std::cell::Cell<Vec<u32>> = const { std::cell::Cell::new(Vec::new()) };
}

/// Lends a buffer of `len` words from `cell`, with whatever it holds.
fn with_buffer<R>(
    cell: &'static std::thread::LocalKey<std::cell::Cell<Vec<u32>>>,
    len: usize,
    work: impl FnOnce(&mut [u32]) -> R,
) -> R {
    let mut buffer = cell.take();
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let result = work(&mut buffer[..len]);
    cell.set(buffer);
    result
}

fn blocked(
    kernel: Kernel,
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
            let panel = pairs * NR;
            let panels = block_cols.div_ceil(NR);
            with_buffer(&PACKED_RHS, panels * panel, |packed_rhs| {
                let pack_one = |(j, packed): (usize, &mut [u32])| {
                    pack::<NR>(packed, rhs.t(), col + j * NR, k, pairs);
                };
                if threaded {
                    packed_rhs.par_chunks_mut(panel).enumerate().for_each(pack_one);
                } else {
                    packed_rhs.chunks_mut(panel).enumerate().for_each(pack_one);
                }
                let multiply = |(i, dst_rows): (usize, &mut [f32])| {
                    let row = i * block_rows;
                    let block = Block { rows: block_rows.min(rows - row), col, block_cols };
                    with_buffer(&PACKED_LHS, block.rows.div_ceil(MR) * pairs * MR, |packed_lhs| {
                        for (t, packed) in packed_lhs.chunks_mut(pairs * MR).enumerate() {
                            pack::<MR>(packed, lhs, row + t * MR, k, pairs);
                        }
                        block.multiply(
                            kernel, dst_rows, row_stride, packed_lhs, packed_rhs, pairs, accumulate,
                        );
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

/// The part of the result that one task works on.
struct Block {
    rows: usize,
    col: usize,
    block_cols: usize,
}

impl Block {
    /// Runs the kernel on every tile of the block. `dst` starts at the block's first row.
    #[expect(clippy::too_many_arguments, reason = "one call, right above")]
    fn multiply(
        &self,
        kernel: Kernel,
        dst: &mut [f32],
        row_stride: usize,
        packed_lhs: &[u32],
        packed_rhs: &[u32],
        pairs: usize,
        accumulate: bool,
    ) {
        for (j, rhs_panel) in packed_rhs.chunks(pairs * NR).enumerate() {
            let col = self.col + j * NR;
            let width = NR.min(self.col + self.block_cols - col);
            for (i, lhs_panel) in packed_lhs.chunks(pairs * MR).enumerate() {
                let tile = kernel(pairs, lhs_panel, rhs_panel);
                let height = MR.min(self.rows - i * MR);
                for (r, sums) in tile.iter().enumerate().take(height) {
                    let out = &mut dst[(i * MR + r) * row_stride + col..][..width];
                    if accumulate {
                        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                    } else {
                        out.copy_from_slice(&sums[..width]);
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

/// Packs rows `row..row + W` and columns `k..k + 2 pairs` of `mat` as `pairs` rows of `W` words, zeros beyond its
/// edges.
fn pack<const W: usize>(packed: &mut [u32], mat: Mat<'_, f32>, row: usize, k: usize, pairs: usize) {
    let rows = W.min(mat.rows - row);
    let depth = (mat.cols - k).min(2 * pairs);
    if rows < W || depth < 2 * pairs {
        packed.fill(0);
    }
    let data = &mat.data[row * mat.row_stride + k * mat.col_stride..];
    if mat.col_stride == 1 {
        crate::cpu::simd(
            #[inline(always)]
            || {
                // A line is rounded in one sweep, then spread over the panel.
                let mut line = [0u32; KC / 2];
                for r in 0..rows {
                    let values = &data[r * mat.row_stride..][..depth];
                    let (even, odd) = values.split_at(depth / 2 * 2);
                    for (word_out, pair) in line.iter_mut().zip(even.chunks_exact(2)) {
                        *word_out = word(pair[0], pair[1]);
                    }
                    if let [last] = odd {
                        line[depth / 2] = word(*last, 0.0);
                    }
                    for (out, &word) in packed.chunks_exact_mut(W).zip(&line[..depth.div_ceil(2)]) {
                        out[r] = word;
                    }
                }
            },
        );
    } else {
        crate::cpu::simd(
            #[inline(always)]
            || {
                let zeros = [0.0; W];
                for (p, out) in packed.chunks_exact_mut(W).enumerate().take(depth.div_ceil(2)) {
                    let first = &data[2 * p * mat.col_stride..][..rows];
                    let second = match 2 * p + 1 < depth {
                        true => &data[(2 * p + 1) * mat.col_stride..][..rows],
                        false => &zeros[..rows],
                    };
                    for ((out, &a), &b) in out.iter_mut().zip(first).zip(second) {
                        *out = word(a, b);
                    }
                }
            },
        );
    }
}

/// The kernel for machines without bf16 instructions: the same numbers up to the order of the two sums in a pair.
fn portable_tile(pairs: usize, lhs: &[u32], rhs: &[u32]) -> Tile {
    let first = |word: u32| f32::from_bits(word << 16);
    let second = |word: u32| f32::from_bits(word & 0xffff_0000);
    crate::cpu::simd(
        #[inline(always)]
        || {
            let mut tile = [[0.0; NR]; MR];
            for (a, b) in lhs.chunks_exact(MR).zip(rhs.chunks_exact(NR)).take(pairs) {
                for (row, &a) in tile.iter_mut().zip(a) {
                    for (sum, &b) in row.iter_mut().zip(b) {
                        *sum += first(a) * first(b) + second(a) * second(b);
                    }
                }
            }
            tile
        },
    )
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the bf16 instructions exist as intrinsics only")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{MR, NR, Tile};

    pub(super) fn tile(pairs: usize, lhs: &[u32], rhs: &[u32]) -> Tile {
        assert!(lhs.len() >= pairs * MR && rhs.len() >= pairs * NR);
        // SAFETY: `matmul` takes this kernel only if `is_native()`; the panels are as long as just asserted.
        unsafe { native_tile(pairs, lhs.as_ptr(), rhs.as_ptr()) }
    }

    /// # Safety
    /// * the machine has AVX-512 F, BW and BF16
    /// * `lhs` and `rhs` hold `pairs * MR` and `pairs * NR` words
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn native_tile(pairs: usize, lhs: *const u32, rhs: *const u32) -> Tile {
        let mut sums: [[__m512; 2]; MR] = [[_mm512_setzero_ps(); 2]; MR];
        for p in 0..pairs {
            // SAFETY: row `p < pairs` of the right panel: NR = 32 words from `p * NR`.
            let b: [__m512i; 2] = unsafe {
                let row = rhs.add(p * NR);
                [_mm512_loadu_si512(row.cast()), _mm512_loadu_si512(row.add(16).cast())]
            };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: word `r < MR` of row `p < pairs` of the left panel.
                let a = unsafe { lhs.add(p * MR + r).read() };
                let a = bits(_mm512_set1_epi32(a.cast_signed()));
                sums[0] = _mm512_dpbf16_ps(sums[0], a, bits(b[0]));
                sums[1] = _mm512_dpbf16_ps(sums[1], a, bits(b[1]));
            }
        }
        let mut tile = [[0.0; NR]; MR];
        for (row, sums) in tile.iter_mut().zip(sums) {
            // SAFETY: a row has NR = 32 elements, two vectors of 16.
            unsafe {
                _mm512_storeu_ps(row.as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(row.as_mut_ptr().add(16), sums[1]);
            }
        }
        tile
    }

    /// The same 512 bits, seen as 32 bf16.
    #[inline(always)]
    fn bits(words: __m512i) -> __m512bh {
        // SAFETY: both are 64 plain bytes.
        unsafe { std::mem::transmute(words) }
    }
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
            [(1, 1, 1), (12, 32, 256), (13, 33, 257), (5, 70, 3), (97, 31, 600), (500, 7, 20)]
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
                for kernel in [portable_tile as Kernel].into_iter().chain(native()) {
                    let stride = n + 3;
                    let mut out = vec![f32::NAN; m * stride];
                    blocked(kernel, MatMut::strided(&mut out, m, n, stride), lhs, rhs, false, true);
                    blocked(kernel, MatMut::strided(&mut out, m, n, stride), lhs, rhs, true, false);
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

    fn native() -> Option<Kernel> {
        #[cfg(target_arch = "x86_64")]
        return is_native().then_some(avx512::tile as Kernel);
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
