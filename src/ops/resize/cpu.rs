//! The resampling itself, as Pillow has it, and the crops of a batch.
//!
//! `kernels/resize.cu` has the same windows and weights, in the same order of operations.

use rayon::prelude::*;

use super::{Forward, Interpolation};
use crate::ops::input::Geometry;

/// Pixels to resample.
#[derive(Clone, Copy)]
pub(crate) struct Rectangle<'a> {
    /// RGB bytes; the first row starts with the first of them.
    pub(crate) pixels: &'a [u8],
    /// Bytes from one row to the next, at least `3 width`.
    pub(crate) stride: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
}

impl<'a> Rectangle<'a> {
    fn row(&self, r: usize) -> &'a [u8] {
        &self.pixels[self.stride * r..][..3 * self.width]
    }
}

/// Resamples `inp` to `out`, `(height, width, 3)`. No side of either is 0.
pub(crate) fn resample(
    out: &mut [u8],
    (height, width): (usize, usize),
    inp: Rectangle<'_>,
    interpolation: Interpolation,
) {
    pulp::Arch::new().dispatch(Resample { out, height, width, inp, interpolation });
}

/// A call of [`resample`], compiled once for each width of vectors.
struct Resample<'a> {
    out: &'a mut [u8],
    height: usize,
    width: usize,
    inp: Rectangle<'a>,
    interpolation: Interpolation,
}

impl pulp::NullaryFnOnce for Resample<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { out, height, width, inp, interpolation } = self;
        let squeezed = horizontal(inp, width, interpolation);
        vertical(out, &squeezed, inp.height, (height, width), interpolation);
    }
}

pub(super) fn forward(args: Forward<'_>, side: usize) {
    let bytes = args.images.as_slice::<u8>();
    let rows: &[Geometry] = bytemuck::cast_slice(args.geometry.as_slice::<i64>());
    let crops = args.crops.into_slice::<u8>().par_chunks_exact_mut(3 * side * side);
    crops.zip(rows).for_each(|(crop, row)| {
        let (height, width) = (row.height as usize, row.width as usize);
        let pixels = &bytes[row.offset as usize..];
        let inp = Rectangle { pixels, stride: 3 * width, height, width };
        resample(crop, (side, side), inp, args.interpolation);
        if row.flip == 1 {
            for row in crop.chunks_exact_mut(3 * side) {
                row.as_chunks_mut::<3>().0.reverse();
            }
        }
    });
}

/// Fractional bits of a weight: 32, less 8 of a byte, less 2 for the overshoot of the cubic.
const FRACTION_BITS: u32 = 22;

/// Rows that the horizontal pass takes at a time.
const BLOCK_ROWS: usize = 16;

/// Bytes that a weighted sum takes at a time: one column of a block of rows, three channels each.
const LANES: usize = 3 * BLOCK_ROWS;

/// Resizes the columns. The rows of the result are `padded(width)` bytes apart.
#[inline(always)]
fn horizontal(inp: Rectangle<'_>, width: usize, interpolation: Interpolation) -> Vec<u8> {
    let stride = padded(width);
    let mut out = vec![0; stride * inp.height];
    if width == inp.width {
        for (r, out) in out.chunks_exact_mut(stride).enumerate() {
            out[..3 * width].copy_from_slice(inp.row(r));
        }
        return out;
    }
    let windows = Windows::new(inp.width, width, interpolation);
    // One column of the block after the other, so that a sum over columns runs over contiguous bytes.
    let mut block = vec![0; LANES * inp.width];
    for (b, out) in out.chunks_mut(stride * BLOCK_ROWS).enumerate() {
        for r in 0..out.len() / stride {
            let pixels = inp.row(b * BLOCK_ROWS + r).as_chunks::<3>().0;
            for (column, pixel) in block.as_chunks_mut::<LANES>().0.iter_mut().zip(pixels) {
                column[3 * r..3 * r + 3].copy_from_slice(pixel);
            }
        }
        for x in 0..width {
            let (first, weights) = windows.of(x);
            let sums = weighted_sum(&block[LANES * first..], LANES, weights);
            for (out, sum) in out.chunks_exact_mut(stride).zip(sums.as_chunks::<3>().0) {
                out[3 * x..3 * x + 3].copy_from_slice(sum);
            }
        }
    }
    out
}

/// Resizes the rows of what [`horizontal`] gave.
#[inline(always)]
fn vertical(
    out: &mut [u8],
    inp: &[u8],
    inp_height: usize,
    (height, width): (usize, usize),
    interpolation: Interpolation,
) {
    let stride = padded(width);
    let rows = out.chunks_exact_mut(3 * width);
    if height == inp_height {
        for (out, inp) in rows.zip(inp.chunks_exact(stride)) {
            out.copy_from_slice(&inp[..3 * width]);
        }
        return;
    }
    let windows = Windows::new(inp_height, height, interpolation);
    for (y, out) in rows.enumerate() {
        let (first, weights) = windows.of(y);
        for (i, out) in out.chunks_mut(LANES).enumerate() {
            let sums = weighted_sum(&inp[stride * first + LANES * i..], stride, weights);
            out.copy_from_slice(&sums[..out.len()]);
        }
    }
}

/// Bytes from one row to the next between the passes: whole lanes.
fn padded(width: usize) -> usize {
    (3 * width).next_multiple_of(LANES)
}

/// `sum over k of weights[k] * inp[k * stride + lane]`, rounded and clipped to a byte.
#[inline(always)]
fn weighted_sum(inp: &[u8], stride: usize, weights: &[i32]) -> [u8; LANES] {
    // Three variables and not one array, so that they stay in registers.
    let [mut a, mut b, mut c] = [[1i32 << (FRACTION_BITS - 1); VECTOR]; 3];
    for (run, &weight) in inp.chunks(stride).zip(weights) {
        let [x, y, z, ..] = run.as_chunks::<VECTOR>().0 else {
            unreachable!("runs are LANES bytes or more, apart or at the end")
        };
        multiply_add(&mut a, x, weight);
        multiply_add(&mut b, y, weight);
        multiply_add(&mut c, z, weight);
    }
    let mut out = [0; LANES];
    for (out, sums) in out.as_chunks_mut::<VECTOR>().0.iter_mut().zip([a, b, c]) {
        for lane in 0..VECTOR {
            out[lane] = (sums[lane] >> FRACTION_BITS).clamp(0, 255) as u8;
        }
    }
    out
}

#[inline(always)]
fn multiply_add(sums: &mut [i32; VECTOR], inp: &[u8; VECTOR], weight: i32) {
    for lane in 0..VECTOR {
        sums[lane] += weight * i32::from(inp[lane]);
    }
}

/// Sums of a vector register.
const VECTOR: usize = LANES / 3;

/// The inputs that each output of one axis is made of, and their weights.
struct Windows {
    /// First input of each output.
    first: Vec<usize>,
    /// Inputs of each output.
    len: Vec<usize>,
    /// `taps` weights for each output, of which the first `len` count.
    weights: Vec<i32>,
    /// Most inputs an output has.
    taps: usize,
}

impl Windows {
    fn new(inp: usize, out: usize, interpolation: Interpolation) -> Self {
        let (kernel, radius): (fn(f64) -> f64, f64) = match interpolation {
            Interpolation::Bicubic => (cubic, 2.0),
            Interpolation::Bilinear => (triangle, 1.0),
        };
        let scale = inp as f64 / out as f64;
        let stretch = scale.max(1.0);
        let shrink = 1.0 / stretch;
        let support = radius * stretch;
        let taps = support.ceil() as usize * 2 + 1;
        let mut windows = Self {
            first: Vec::with_capacity(out),
            len: Vec::with_capacity(out),
            weights: vec![0; taps * out],
            taps,
        };
        let mut exact = vec![0.0; taps];
        for (x, weights) in windows.weights.chunks_exact_mut(taps).enumerate() {
            let centre = (x as f64 + 0.5) * scale;
            // Both casts truncate towards zero, and negative values to 0, as Pillow's bounds do.
            let first = (centre - support + 0.5) as usize;
            let len = ((centre + support + 0.5) as usize).min(inp) - first;
            let mut sum = 0.0;
            for (k, weight) in exact[..len].iter_mut().enumerate() {
                *weight = kernel(((k + first) as f64 - centre + 0.5) * shrink);
                sum += *weight;
            }
            for (fixed, weight) in weights.iter_mut().zip(&exact[..len]) {
                let scaled = weight / sum * f64::from(1 << FRACTION_BITS);
                *fixed = (scaled + 0.5f64.copysign(scaled)) as i32;
            }
            windows.first.push(first);
            windows.len.push(len);
        }
        windows
    }

    /// First input of output `x`, and the weights of that and the following inputs.
    fn of(&self, x: usize) -> (usize, &[i32]) {
        (self.first[x], &self.weights[x * self.taps..][..self.len[x]])
    }
}

/// Keys' cubic convolution kernel with a = -0.5, in the order of operations that Pillow has.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}
