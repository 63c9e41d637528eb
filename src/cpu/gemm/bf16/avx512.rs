//! The bf16 routines in AVX-512 BF16: multiply-add of pairs, and rounding into packed pairs.
//!
//! Used only where [`super::is_native`] finds the instructions.
#![expect(unsafe_code, reason = "these instructions exist as intrinsics only")]

use std::arch::x86_64::*;

use super::{Lines, MR, NR, Routines, Tile};

/// Taken by `matmul` only if `is_native()`.
pub(super) const ROUTINES: Routines = Routines { tile, pack_along, pack_across };

fn tile(tile: Tile<'_>, pairs: usize, lhs: &[u32], rhs: &[u32], accumulate: bool) {
    let Tile { out, stride } = tile;
    assert!(out.len() >= (MR - 1) * stride + NR);
    assert!(lhs.len() >= pairs * MR && rhs.len() >= pairs * NR);
    let (out, lhs, rhs) = (out.as_mut_ptr(), lhs.as_ptr(), rhs.as_ptr());
    // SAFETY: `ROUTINES` is taken only if `is_native()`; the slices are as long as just asserted.
    unsafe { native_tile(out, stride, pairs, lhs, rhs, accumulate) }
}

/// # Safety
/// * the machine has AVX-512 F, BW, VL and BF16
/// * `out` holds NR elements at each of MR rows, `stride` apart
/// * `lhs` and `rhs` hold `pairs * MR` and `pairs * NR` words
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn native_tile(
    out: *mut f32,
    stride: usize,
    pairs: usize,
    lhs: *const u32,
    rhs: *const u32,
    accumulate: bool,
) {
    for r in 0..MR {
        for at in [0, 16, 32, NR - 1] {
            // SAFETY: an address within row `r < MR` of `out`; by the end the tile is in L1.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(out.add(r * stride + at).cast()) };
        }
    }
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
    for (r, sums) in sums.into_iter().enumerate() {
        for (at, sum) in [0, 16, 32].into_iter().zip(sums) {
            // SAFETY: elements `at..at + 16` of row `r < MR` of `out`; NR is 48.
            unsafe {
                let out = out.add(r * stride + at);
                let sum = if accumulate { _mm512_add_ps(_mm512_loadu_ps(out), sum) } else { sum };
                _mm512_storeu_ps(out, sum);
            }
        }
    }
}

/// The same 512 bits, seen as 32 bf16.
#[inline(always)]
fn halves(words: __m512i) -> __m512bh {
    // SAFETY: both are 64 plain bytes.
    unsafe { std::mem::transmute(words) }
}

/// Lines that are turned at once, and elements of each.
const TURN: (usize, usize) = (8, 32);

fn pack_along(panel: &mut [u32], width: usize, lines: Lines<'_>) {
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
        super::pack_along(&mut panel[along / 2 * width..], width, rest);
    }
    if turned < count {
        let data = &data[turned * stride..];
        let rest = Lines { data, stride, count: count - turned, depth };
        super::pack_along(&mut panel[turned..], width, rest);
    }
}

fn pack_across(packed: &mut [u32], width: usize, pairs: usize, lines: Lines<'_>) {
    let Lines { data, stride, count, depth } = lines;
    let (eights, whole) = (count / 8 * 8, depth / 2);
    assert!(width.is_multiple_of(8) && pairs >= whole);
    // Some columns at a time: enough of a line to read it well, few enough panels to write in turn.
    let group = 512usize.next_multiple_of(width);
    for (g, packed) in packed.chunks_mut(group * pairs).enumerate() {
        let columns = (g * group).min(eights)..((g + 1) * group).min(eights);
        for p in 0..whole {
            let pair = [0, 1].map(|line| &data[(2 * p + line) * stride..][columns.clone()]);
            let parts = pair[0].chunks(width).zip(pair[1].chunks(width));
            for (panel, (first, second)) in packed.chunks_mut(pairs * width).zip(parts) {
                let into = &mut panel[p * width..][..first.len()];
                // SAFETY: `ROUTINES` is taken only if `is_native()`; all three are equally long, by eights.
                unsafe { interleave(into, first, second) }
            }
        }
    }
    // What is left: a last line without a partner, then the last columns.
    if depth % 2 == 1 {
        let rows = &data[(depth - 1) * stride..][..eights];
        for (r, &a) in rows.iter().enumerate() {
            packed[r / width * pairs * width + whole * width + r % width] = super::word(a, 0.0);
        }
    }
    for r in eights..count {
        let column = &mut packed[r / width * pairs * width + r % width..];
        let last = Lines { data: &data[r..], stride, count: 1, depth };
        // One column: its words are `width` apart, as rows of a panel are.
        super::pack_across(column, width, pairs, last);
    }
}

/// Rounds two lines to bf16 and writes their pairs.
///
/// # Safety
/// * the machine has AVX-512 F, BW, VL and BF16
/// * all three slices have the same length, a multiple of 8
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn interleave(into: &mut [u32], first: &[f32], second: &[f32]) {
    let order = _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    let pairs = first.chunks_exact(8).zip(second.chunks_exact(8));
    for (into, (first, second)) in into.chunks_exact_mut(8).zip(pairs) {
        // SAFETY: each chunk is 8 elements, one vector of 256 bits; both types are 32 plain bytes.
        unsafe {
            let (a, b) = (_mm256_loadu_ps(first.as_ptr()), _mm256_loadu_ps(second.as_ptr()));
            let ab = std::mem::transmute::<__m256bh, __m256i>(_mm256_cvtne2ps_pbh(b, a));
            _mm256_storeu_si256(into.as_mut_ptr().cast(), _mm256_permutexvar_epi16(order, ab));
        }
    }
}

/// Rounds 8 lines of 32 elements to bf16 and writes them as 16 rows of 8 words.
///
/// # Safety
/// * the machine has AVX-512 F, BW, VL and BF16
/// * `from` holds 32 elements at each of 8 lines, `stride` apart
/// * `into` holds 8 words at each of 16 rows, `width` apart
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
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
