//! Resizing of RGB bytes, bit for bit as Pillow does it (`Image.resize` with `BICUBIC` or `BILINEAR`; releases before
//! 13, which takes the vertical pass first where the height shrinks much more than the width).
//!
//! Each axis is a weighted sum over a window that grows with the reduction, so that shrinking is antialiased. Weights
//! are fixed point with 22 fractional bits; the horizontal pass comes first and rounds to bytes before the
//! vertical one. Not to be confused with `torch.nn.functional.interpolate`, whose bicubic is another (a = -0.75) and
//! which is not antialiased by default.

use crate::data::Image;
use crate::train::config::Interpolation;

/// A rectangle of whole pixels within an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Rect {
    /// All of `image`.
    #[must_use]
    pub fn whole(image: &Image) -> Self {
        Self { top: 0, left: 0, height: image.height, width: image.width }
    }
}

/// `(height, width)` after the short side is resized to `size` and the aspect ratio is kept; the long side is
/// rounded towards zero, as `torchvision.transforms.Resize(size)` has it.
///
/// # Panics
/// If a side is 0.
#[must_use]
pub fn short_side(height: usize, width: usize, size: usize) -> (usize, usize) {
    if height <= width { (size, size * width / height) } else { (size * height / width, size) }
}

/// Crops `image` to `rect`, then resizes the crop to `(height, width)`. Pixels outside `rect` do not bleed in.
///
/// # Panics
/// If `rect` is not within `image`, or a side of either size is 0.
#[must_use]
pub fn resize(
    image: &Image,
    rect: Rect,
    (height, width): (usize, usize),
    interpolation: Interpolation,
) -> Image {
    assert!(rect.top + rect.height <= image.height && rect.left + rect.width <= image.width);
    assert!(rect.height > 0 && rect.width > 0 && height > 0 && width > 0);
    pulp::Arch::new().dispatch(Resize { image, rect, height, width, interpolation })
}

/// A call of [`resize`], compiled once for each width of vectors.
struct Resize<'a> {
    image: &'a Image,
    rect: Rect,
    height: usize,
    width: usize,
    interpolation: Interpolation,
}

impl pulp::NullaryFnOnce for Resize<'_> {
    type Output = Image;

    #[inline(always)]
    fn call(self) -> Image {
        let Self { image, rect, height, width, interpolation } = self;
        let squeezed = horizontal(image, rect, width, interpolation);
        let pixels = vertical(&squeezed, rect.height, (height, width), interpolation);
        Image { height, width, pixels: pixels.into() }
    }
}

/// Fractional bits of a weight: 32, less 8 of a byte, less 2 for the overshoot of the cubic.
const FRACTION_BITS: u32 = 22;

/// Rows that the horizontal pass takes at a time.
const BLOCK_ROWS: usize = 16;

/// Bytes that a weighted sum takes at a time: one column of a block of rows, three channels each.
const LANES: usize = 3 * BLOCK_ROWS;

/// Resizes the columns of `rect`. The rows of the result are `padded(width)` bytes apart.
#[inline(always)]
fn horizontal(image: &Image, rect: Rect, width: usize, interpolation: Interpolation) -> Vec<u8> {
    let stride = padded(width);
    let mut out = vec![0; stride * rect.height];
    let row = |r: usize| {
        let start = 3 * ((rect.top + r) * image.width + rect.left);
        &image.pixels[start..start + 3 * rect.width]
    };
    if width == rect.width {
        for (r, out) in out.chunks_exact_mut(stride).enumerate() {
            out[..3 * width].copy_from_slice(row(r));
        }
        return out;
    }
    let windows = Windows::new(rect.width, width, interpolation);
    // One column of the block after the other, so that a sum over columns runs over contiguous bytes.
    let mut block = vec![0; LANES * rect.width];
    for (b, out) in out.chunks_mut(stride * BLOCK_ROWS).enumerate() {
        for r in 0..out.len() / stride {
            let pixels = row(b * BLOCK_ROWS + r).as_chunks::<3>().0;
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
    inp: &[u8],
    inp_height: usize,
    (height, width): (usize, usize),
    interpolation: Interpolation,
) -> Vec<u8> {
    let stride = padded(width);
    let mut out = vec![0; 3 * width * height];
    let rows = out.chunks_exact_mut(3 * width);
    if height == inp_height {
        for (out, inp) in rows.zip(inp.chunks_exact(stride)) {
            out.copy_from_slice(&inp[..3 * width]);
        }
        return out;
    }
    let windows = Windows::new(inp_height, height, interpolation);
    for (y, out) in rows.enumerate() {
        let (first, weights) = windows.of(y);
        for (i, out) in out.chunks_mut(LANES).enumerate() {
            let sums = weighted_sum(&inp[stride * first + LANES * i..], stride, weights);
            out.copy_from_slice(&sums[..out.len()]);
        }
    }
    out
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
