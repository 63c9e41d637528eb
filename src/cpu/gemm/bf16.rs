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

type Tile = [[f32; NR]; MR];
/// The two routines that differ between machines.
#[derive(Clone, Copy)]
struct Routines {
    /// The product of two panels of `pairs` rows.
    tile: fn(pairs: usize, lhs: &[u32], rhs: &[u32]) -> Tile,
    /// Packs lines that lie along `k`: see [`pack_lines`].
    pack_lines: fn(panel: &mut [u32], width: usize, lines: Lines<'_>),
}

/// Neighbouring lines of a matrix, each along `k`.
#[derive(Clone, Copy)]
struct Lines<'a> {
    data: &'a [f32],
    stride: usize,
    count: usize,
    depth: usize,
}

const PORTABLE: Routines = Routines { tile: portable_tile, pack_lines };

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
        return blocked(avx512::ROUTINES, dst, lhs, rhs, accumulate, threaded);
    }
    blocked(PORTABLE, dst, lhs, rhs, accumulate, threaded);
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
        simd!(|| {
            for (rhs_panel, col) in rhs.chunks(pairs * NR).zip(self.cols.clone().step_by(NR)) {
                let width = NR.min(self.cols.end - col);
                for (lhs_panel, row) in lhs.chunks(pairs * MR).zip((0..self.rows).step_by(MR)) {
                    let tile = (routines.tile)(pairs, lhs_panel, rhs_panel);
                    let rows = dst[row * self.row_stride..].chunks_mut(self.row_stride);
                    for (sums, out) in tile.iter().take(self.rows - row).zip(rows) {
                        let out = &mut out[col..col + width];
                        if let (Ok(out), true) = (<&mut [f32; NR]>::try_from(&mut *out), accumulate)
                        {
                            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                        } else if accumulate {
                            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                        } else {
                            out.copy_from_slice(&sums[..width]);
                        }
                    }
                }
            }
        });
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
    let depth = (mat.cols - k).min(2 * pairs);
    let data = &mat.data[range.start * mat.row_stride + k * mat.col_stride..];
    if mat.col_stride == 1 {
        for (panel, row) in packed.chunks_mut(pairs * W).zip((0..range.len()).step_by(W)) {
            let count = W.min(range.len() - row);
            if count < W || depth % 2 == 1 {
                panel.fill(0);
            }
            let (data, stride) = (&data[row * mat.row_stride..], mat.row_stride);
            (routines.pack_lines)(panel, W, Lines { data, stride, count, depth });
        }
    } else {
        pack_across::<W>(packed, data, mat.col_stride, range.len(), depth, pairs);
    }
}

/// Packs `count` rows that lie across `k`: row pairs are read from end to end and dealt out to the panels.
fn pack_across<const W: usize>(
    packed: &mut [u32],
    data: &[f32],
    stride: usize,
    count: usize,
    depth: usize,
    pairs: usize,
) {
    let zeros = [0.0; W];
    simd!(|| {
        for p in 0..depth.div_ceil(2) {
            let first = &data[2 * p * stride..][..count];
            let second = (2 * p + 1 < depth).then(|| &data[(2 * p + 1) * stride..][..count]);
            for (t, panel) in packed.chunks_mut(pairs * W).enumerate() {
                let out = &mut panel[p * W..][..W];
                let width = W.min(count - t * W);
                let a = &first[t * W..][..width];
                let b = second.map_or(&zeros[..width], |second| &second[t * W..][..width]);
                if width < W {
                    out.fill(0);
                }
                let whole = (<&[f32; W]>::try_from(a), <&[f32; W]>::try_from(b));
                if let (Ok(a), Ok(b)) = whole {
                    out.iter_mut().zip(a).zip(b).for_each(|((out, &a), &b)| *out = word(a, b));
                } else {
                    out.iter_mut().zip(a).zip(b).for_each(|((out, &a), &b)| *out = word(a, b));
                }
            }
        }
    });
}

/// Packs lines that lie along `k` into a panel `width` words wide.
fn pack_lines(panel: &mut [u32], width: usize, lines: Lines<'_>) {
    for r in 0..lines.count {
        let line = &lines.data[r * lines.stride..][..lines.depth];
        for (out, pair) in panel[r..].iter_mut().step_by(width).zip(line.chunks(2)) {
            *out = word(pair[0], pair.get(1).copied().unwrap_or(0.0));
        }
    }
}

/// The kernel for machines without bf16 instructions: the same numbers up to the order of the two sums in a pair.
fn portable_tile(pairs: usize, lhs: &[u32], rhs: &[u32]) -> Tile {
    let first = |word: u32| f32::from_bits(word << 16);
    let second = |word: u32| f32::from_bits(word & 0xffff_0000);
    simd!(|| {
        let mut tile = [[0.0; NR]; MR];
        for (a, b) in lhs.chunks_exact(MR).zip(rhs.chunks_exact(NR)).take(pairs) {
            for (row, &a) in tile.iter_mut().zip(a) {
                for (sum, &b) in row.iter_mut().zip(b) {
                    *sum += first(a) * first(b) + second(a) * second(b);
                }
            }
        }
        tile
    })
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the bf16 instructions exist as intrinsics only")]
mod avx512 {
    use std::arch::x86_64::{
        __m128i, __m512, __m512bh, __m512i, _mm_storeu_si128, _mm512_cvtne2ps_pbh,
        _mm512_dpbf16_ps, _mm512_extracti32x4_epi32, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_ps,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    use super::{Lines, MR, NR, Routines, Tile};

    /// Taken by `matmul` only if `is_native()`.
    pub(super) const ROUTINES: Routines = Routines { tile, pack_lines };

    /// Lines that are turned at once, and elements of each.
    const TURN: (usize, usize) = (8, 32);

    fn tile(pairs: usize, lhs: &[u32], rhs: &[u32]) -> Tile {
        assert!(lhs.len() >= pairs * MR && rhs.len() >= pairs * NR);
        // SAFETY: `ROUTINES` is taken only if `is_native()`; the panels are as long as just asserted.
        unsafe { native_tile(pairs, lhs.as_ptr(), rhs.as_ptr()) }
    }

    /// # Safety
    /// * the machine has AVX-512 F, BW and BF16
    /// * `lhs` and `rhs` hold `pairs * MR` and `pairs * NR` words
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn native_tile(pairs: usize, lhs: *const u32, rhs: *const u32) -> Tile {
        let mut sums: [[__m512; 3]; MR] = [[_mm512_setzero_ps(); 3]; MR];
        for p in 0..pairs {
            // SAFETY: row `p < pairs` of the right panel: NR = 48 words from `p * NR`.
            let b: [__m512i; 3] = unsafe {
                let row = rhs.add(p * NR);
                [0, 16, 32].map(|at| _mm512_loadu_si512(row.add(at).cast()))
            };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: word `r < MR` of row `p < pairs` of the left panel.
                let a = unsafe { lhs.add(p * MR + r).read() };
                let a = halves(_mm512_set1_epi32(a.cast_signed()));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_dpbf16_ps(*sum, a, halves(b));
                }
            }
        }
        let mut tile = [[0.0; NR]; MR];
        for (row, sums) in tile.iter_mut().zip(sums) {
            for (out, sum) in row.chunks_exact_mut(16).zip(sums) {
                // SAFETY: a chunk is 16 elements, one vector.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) }
            }
        }
        tile
    }

    /// The same 512 bits, seen as 32 bf16.
    #[inline(always)]
    fn halves(words: __m512i) -> __m512bh {
        // SAFETY: both are 64 plain bytes.
        unsafe { std::mem::transmute(words) }
    }

    fn pack_lines(panel: &mut [u32], width: usize, lines: Lines<'_>) {
        let Lines { data, stride, count, depth } = lines;
        let (turned, along) = (count / TURN.0 * TURN.0, depth / TURN.1 * TURN.1);
        for line in (0..turned).step_by(TURN.0) {
            for k in (0..along).step_by(TURN.1) {
                let from = &data[line * stride + k..][..(TURN.0 - 1) * stride + TURN.1];
                let last = (k / 2 + TURN.1 / 2 - 1) * width + line + TURN.0;
                let into = &mut panel[k / 2 * width + line..last];
                // SAFETY: `ROUTINES` is taken only if `is_native()`; `from` reaches to the end of the eighth
                // line's 32 elements and `into` to the end of the sixteenth row's 8 words, as just sliced.
                unsafe { turn(into.as_mut_ptr(), width, from.as_ptr(), stride) }
            }
        }
        // What is left: the lines' ends, then the last lines.
        if along < depth {
            let data = &data[along..];
            let rest = Lines { data, stride, count: turned, depth: depth - along };
            super::pack_lines(&mut panel[along / 2 * width..], width, rest);
        }
        if turned < count {
            let data = &data[turned * stride..];
            let rest = Lines { data, stride, count: count - turned, depth };
            super::pack_lines(&mut panel[turned..], width, rest);
        }
    }

    /// Rounds 8 lines of 32 elements to bf16 and writes them as 16 rows of 8 words.
    ///
    /// # Safety
    /// * the machine has AVX-512 F, BW and BF16
    /// * `from` holds 32 elements at each of 8 lines, `stride` apart
    /// * `into` holds 8 words at each of 16 rows, `width` apart
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn turn(into: *mut u32, width: usize, from: *const f32, stride: usize) {
        let mut lines = [_mm512_setzero_si512(); 8];
        for (l, line) in lines.iter_mut().enumerate() {
            // SAFETY: elements 0..32 of line `l < 8`; both types are 64 plain bytes.
            *line = unsafe {
                let low = _mm512_loadu_ps(from.add(l * stride));
                let high = _mm512_loadu_ps(from.add(l * stride + 16));
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            };
        }
        for half in [0, 4] {
            let [a, b, c, d] = [lines[half], lines[half + 1], lines[half + 2], lines[half + 3]];
            // Within each quarter q of a register, a 4 x 4 square is turned: row j then holds column 4 q + j.
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            let columns = [
                _mm512_unpacklo_epi64(ab_low, cd_low),
                _mm512_unpackhi_epi64(ab_low, cd_low),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ];
            for (j, column) in columns.into_iter().enumerate() {
                let quarters = [
                    _mm512_extracti32x4_epi32::<0>(column),
                    _mm512_extracti32x4_epi32::<1>(column),
                    _mm512_extracti32x4_epi32::<2>(column),
                    _mm512_extracti32x4_epi32::<3>(column),
                ];
                for (q, quarter) in quarters.into_iter().enumerate() {
                    // SAFETY: words `half..half + 4` of row `4 q + j < 16`.
                    unsafe {
                        let row = into.add((4 * q + j) * width + half);
                        _mm_storeu_si128(row.cast::<__m128i>(), quarter);
                    }
                }
            }
        }
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
