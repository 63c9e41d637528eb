//! PixMIM's target (Liu et al. 2023, arXiv:2303.02416; `LowFreqTargetGenerator` of mmselfsup): the image through an
//! ideal low-pass filter.
//!
//! For a channel `x` of `S x S` pixels on [0, 1], with signed frequencies `u, v`:
//!
//! `X(u, v) = sum_{y, x} x(y, x) exp(-2 pi i (u y + v x) / S)`,
//! `t(y, x) = | 1 / S^2 sum_{kept u, v} X(u, v) exp(2 pi i (u y + v x) / S) |`,
//!
//! and the target is `(t - mean) / std`, patchified as (row, column, channel). Kept are the bins of a disc in the
//! *shifted* spectrum around `(S - 1) / 2`: for even `S` that is half a bin off, `(u + 1/2)^2 + (v + 1/2)^2 <= radius^2`,
//! for odd `S` `u^2 + v^2 <= radius^2`. So the inverse is complex and its *magnitude* is taken. Both are the released
//! source's, kept on purpose. The source leaves out the inverse shift, a phase that the magnitude removes.
//!
//! Only the kept frequencies are ever formed: truncated transforms of rows and columns, forth and back, each a matrix
//! product.
//!
//! On a GPU bytes of 224 pixels at radius 40 and of 448 at 80 are filtered with half-precision operands and f32 sums
//! (an error of about 1e-3 in a target patch of unit variance), anything else in f32; see [`Forward::exact`].

mod launch;

use super::cost::{self, Cost};
use super::{expect_colours, expect_ids, expect_nonzero, for_real, patch_numbers};
use crate::device::{Call, Place};
use crate::tensor::{carve_bytes, expect_workspace};
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// The filter of one size and radius: its frequencies and their tables, made once.
#[derive(Debug)]
pub struct Filter {
    size: usize,
    radius: f64,
    /// Signed frequencies of an axis of which any bin is kept, ascending.
    frequencies: Vec<i64>,
    /// `(n, n)`: 1 where the bin (u, v) is kept.
    keep: Vec<f64>,
    tables: Tables,
}

/// Cosines and sines of `2 pi f y / S`, where the op will run.
#[derive(Debug)]
enum Tables {
    Cpu { f32: Table<f32>, f64: Table<f64> },
    Gpu(launch::GpuTables),
}

#[derive(Debug)]
struct Table<T> {
    /// `(S, n)` row-major: `cos(2 pi x v / S)`.
    cos: Vec<T>,
    /// `(S, n)` row-major: `sin(2 pi x v / S)`.
    sin: Vec<T>,
    /// `(2 n, 2 S)`: `[[cos, sin], [-sin, cos]]` over (frequency, pixel): the forward transform of stacked real and
    /// imaginary parts.
    forth: Vec<T>,
    /// `(2 S, 2 n)`: the transpose of `forth`, which is the inverse transform.
    back: Vec<T>,
}

/// Whether the disc holds the bin of these signed frequencies.
fn is_kept(size: usize, radius: f64, bin: [i64; 2]) -> bool {
    // Twice the distance from the disc's centre, exact in integers: 2 f + 1 for even sizes, 2 f for odd ones.
    let twice = |f: i64| 2 * f + i64::from(size.is_multiple_of(2));
    bin.map(|f| twice(f).pow(2)).iter().sum::<i64>() as f64 <= 4.0 * radius * radius
}

/// Signed frequencies of an axis of which any bin is kept, ascending.
pub(super) fn frequencies(size: usize, radius: f64) -> Vec<i64> {
    let half = (size / 2) as i64;
    let nearest = if size.is_multiple_of(2) { -1 } else { 0 };
    (-half..size as i64 - half).filter(|&f| is_kept(size, radius, [f, nearest])).collect()
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, M, E)`, (row, column, channel), for the masked patches; f32 on a GPU. Overwritten.
    pub target: TensorMut<'a>,
    /// `(B, 3, S, S)`, RGB: real on [0, 1], or on a GPU f32 on [0, 1] or u8 on 0 to 255.
    pub pixels: TensorRef<'a>,
    /// `(B, M)` i32, all different in an image.
    pub ids_masked: TensorRef<'a>,
    /// Made for `S` and this device.
    pub filter: &'a Filter,
    /// Mean of the colours, as in [`super::input`].
    pub mean: [f64; 3],
    /// Standard deviation of the colours.
    pub std: [f64; 3],
    /// Pixels along a side of a patch (P).
    pub patch_size: usize,
    /// On a GPU: f32-grade arithmetic instead of half-precision operands. The CPU always is exact.
    pub exact: bool,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Most images in work at once, each with its own scratch.
const LANES: usize = 32;

impl Filter {
    /// The filter of a device for images of `size` (S) pixels a side. PixMIM has radius 40 at 224.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `radius` keeps at least one bin; [`Error::OutOfMemory`] or [`Error::Gpu`] for its tables.
    pub fn new(dev: &Device, size: usize, radius: f64) -> Result<Self> {
        let frequencies = frequencies(size, radius);
        if !radius.is_finite() || radius < 0.0 || frequencies.is_empty() {
            let why = format!(
                "is {radius} and keeps no frequency of {size} pixels; PixMIM has 40 at 224"
            );
            return Err(Error::invalid("radius", why));
        }
        let keep = frequencies
            .iter()
            .flat_map(|&u| {
                frequencies.iter().map(move |&v| f64::from(is_kept(size, radius, [u, v])))
            })
            .collect();
        let f32 = Table::new(size, &frequencies, |x| x as f32);
        let tables = match dev {
            Device::Cpu(_) => Tables::Cpu { f32, f64: Table::new(size, &frequencies, |x| x) },
            Device::Cuda(gpu) => {
                Tables::Gpu(launch::GpuTables::new(dev, gpu, size, radius, &f32.back)?)
            }
        };
        Ok(Self { size, radius, frequencies, keep, tables })
    }

    /// Pixels along a side (S).
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Radius of the disc of kept bins.
    #[must_use]
    pub fn radius(&self) -> f64 {
        self.radius
    }

    /// Number of kept bins.
    #[must_use]
    pub fn kept_bins(&self) -> usize {
        self.keep.iter().filter(|&&keep| keep > 0.0).count()
    }

    /// Where its tables are.
    fn place(&self) -> Place {
        match &self.tables {
            Tables::Cpu { .. } => Place::Host,
            Tables::Gpu(tables) => tables.place(),
        }
    }

    /// Scratch of one image on the CPU, in elements.
    fn scratch_elems(&self) -> usize {
        let (s, n) = (self.size, self.frequencies.len());
        2 * s * n + 2 * n * n + 2 * s * n + 2 * s * s
    }
}

impl<T: Copy + Default + std::ops::Neg<Output = T>> Table<T> {
    fn new(size: usize, frequencies: &[i64], round: impl Fn(f64) -> T) -> Self {
        let n = frequencies.len();
        let angle = |pixel: usize, f: i64| {
            // Reduced in integers first: the angle is exact to the last bit.
            let turns = (pixel as i64 * f).rem_euclid(size as i64) as f64 / size as f64;
            (std::f64::consts::TAU * turns).sin_cos()
        };
        let (mut sin, mut cos) = (vec![T::default(); size * n], vec![T::default(); size * n]);
        let (mut forth, mut back) =
            (vec![T::default(); 4 * n * size], vec![T::default(); 4 * n * size]);
        for pixel in 0..size {
            for (j, &f) in frequencies.iter().enumerate() {
                let (s, c) = angle(pixel, f);
                let (s, c) = (round(s), round(c));
                sin[pixel * n + j] = s;
                cos[pixel * n + j] = c;
                let quadrants = [(0, 0, c), (0, 1, s), (1, 0, -s), (1, 1, c)];
                for (part, from, value) in quadrants {
                    forth[(part * n + j) * 2 * size + from * size + pixel] = value;
                    back[(from * size + pixel) * 2 * n + part * n + j] = value;
                }
            }
        }
        Self { cos, sin, forth, back }
    }
}

/// Bytes of workspace for `images` (B), their pixels of this dtype.
#[must_use]
pub fn workspace_bytes(
    dev: &Device,
    pixels: DType,
    images: usize,
    filter: &Filter,
    exact: bool,
) -> usize {
    match dev {
        Device::Cpu(_) => carve_bytes(pixels, LANES.min(images) * filter.scratch_elems()),
        Device::Cuda(_) => launch::workspace_bytes(pixels, images, filter, exact),
    }
}

/// Filters the images and gathers their masked patches.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] or [`Error::Place`] unless the arguments are as their fields say;
/// [`Error::Invalid`] for a filter of another size, an id or colour outside its bounds, or more patches than a kernel takes;
/// [`Error::Workspace`].
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dtype = args.check(dev)?;
    let _span = dev.span("low_freq_target::forward", || args.cost());
    match dev {
        Device::Cpu(_) => for_real!(dtype, T => cpu::forward::<T>(args)),
        Device::Cuda(gpu) => launch::forward(gpu, args)?,
    }
    Ok(())
}

impl Forward<'_> {
    fn cost(&self) -> Cost {
        let Self { pixels, ids_masked, filter, patch_size, .. } = self;
        let [images, masked] = [0, 1].map(|axis| ids_masked.shape()[axis]);
        let kept = (filter.size / patch_size).pow(2).saturating_sub(masked);
        let shape = [images, filter.size, *patch_size, kept];
        let dtypes = [pixels.dtype(), self.target.dtype()];
        cost::low_freq_target_forward(dtypes, shape, filter.radius)
    }

    fn check(&self, dev: &Device) -> Result<DType> {
        let call = Call { op: "low_freq_target::forward", dev };
        let dtype = match (dev, self.pixels.dtype()) {
            (Device::Cpu(_), _) => self.pixels.expect_real(call, "pixels")?,
            (Device::Cuda(_), dtype @ (DType::U8 | DType::F32)) => dtype,
            (Device::Cuda(_), found) => {
                let (arg, expected) = ("pixels", "U8 or F32".into());
                return Err(Error::DType { op: call.op, arg, expected, found });
            }
        };
        let [images, _, side, _] = self.pixels.dims(call, "pixels", "(B, 3, S, S)")?;
        let [_, masked] = self.ids_masked.dims(call, "ids_masked", "(B, M)")?;
        let numbers = patch_numbers(call, self.patch_size)?;
        expect_colours(call, self.mean, self.std)?;
        expect_nonzero(call, "target", &[images, masked, numbers])?;
        self.pixels.expect(call, "pixels", dtype, &[images, 3, side, side])?;
        self.ids_masked.expect(call, "ids_masked", DType::I32, &[images, masked])?;
        let wide = if dtype == DType::U8 { DType::F32 } else { dtype };
        self.target.expect(call, "target", wide, &[images, masked, numbers])?;
        let (expected, found) = (dev.place(), self.filter.place());
        if expected != found {
            return Err(Error::Place { op: call.op, arg: "filter", expected, found });
        }
        if self.filter.size != side || side % self.patch_size != 0 {
            let why = format!(
                "is for {} pixels; `pixels` has {side}, in patches of {}",
                self.filter.size, self.patch_size
            );
            return Err(Error::invalid("low_freq_target: filter", why));
        }
        let grid = side / self.patch_size;
        expect_ids(call, "ids_masked", &self.ids_masked, grid * grid)?;
        if let Device::Cuda(_) = dev {
            launch::expect_room(self, grid)?;
        }
        let needed = workspace_bytes(dev, dtype, images, self.filter, self.exact);
        expect_workspace(call, &self.workspace, needed)?;
        Ok(dtype)
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Filter, Forward, LANES, Table, Tables};
    use crate::cpu::gemm::{Mat, MatMut, matmul_here};
    use crate::cpu::{Real, simd};
    use crate::scalar::patch_corner;

    /// The tables in precision `T`.
    trait InPrecision: Real {
        fn table(filter: &Filter) -> &Table<Self>;
    }
    impl InPrecision for f32 {
        fn table(filter: &Filter) -> &Table<f32> {
            let Tables::Cpu { f32, .. } = &filter.tables else { unreachable!("checked") };
            f32
        }
    }
    impl InPrecision for f64 {
        fn table(filter: &Filter) -> &Table<f64> {
            let Tables::Cpu { f64, .. } = &filter.tables else { unreachable!("checked") };
            f64
        }
    }

    #[expect(private_bounds, reason = "sealed: f32 and f64")]
    pub(super) fn forward<T: InPrecision>(args: Forward<'_>) {
        let Forward { filter, patch_size, mean, std, .. } = args;
        let [images, masked, numbers] = *args.target.shape() else { unreachable!("checked") };
        let side = filter.size;
        let grid = side / patch_size;
        let per_lane = images.div_ceil(LANES);
        let elems = filter.scratch_elems();
        let (scratch, _) = args.workspace.carve::<T>(LANES.min(images) * elems);
        let pixels = args.pixels.as_slice::<T>().par_chunks(per_lane * 3 * side * side);
        let ids = args.ids_masked.as_slice::<i32>().par_chunks(per_lane * masked);
        let target = args.target.into_slice::<T>().par_chunks_mut(per_lane * masked * numbers);
        let lanes = target.zip(scratch.par_chunks_mut(elems)).zip(pixels.zip(ids));
        lanes.for_each(|((target, scratch), (pixels, ids))| {
            let images = pixels.chunks_exact(3 * side * side).zip(ids.chunks_exact(masked));
            for ((pixels, ids), target) in images.zip(target.chunks_exact_mut(masked * numbers)) {
                for (c, channel) in pixels.chunks_exact(side * side).enumerate() {
                    let low = low_pass(filter, channel, scratch);
                    let (mean, std) = (T::of(mean[c]), T::of(std[c]));
                    for (patch, &id) in target.chunks_exact_mut(numbers).zip(ids) {
                        let (top, left) = patch_corner(id as usize, grid, patch_size);
                        for y in 0..patch_size {
                            let row = &low[(top + y) * side + left..][..patch_size];
                            let into = &mut patch[y * patch_size * 3..][..patch_size * 3];
                            for (pixel, &t) in into.chunks_exact_mut(3).zip(row) {
                                pixel[c] = (t - mean) / std;
                            }
                        }
                    }
                }
            }
        });
    }

    /// One channel, filtered: `(S, S)` on [0, 1] and a little beyond.
    fn low_pass<'a, T: InPrecision>(
        filter: &Filter,
        channel: &[T],
        scratch: &'a mut [T],
    ) -> &'a [T] {
        let (s, n) = (filter.size, filter.frequencies.len());
        let table = T::table(filter);
        let (rows, rest) = scratch.split_at_mut(2 * s * n);
        let (spectrum, rest) = rest.split_at_mut(2 * n * n);
        let (columns, rest) = rest.split_at_mut(2 * s * n);
        let (real, imaginary) = rest[..2 * s * s].split_at_mut(s * s);
        let (cos, sin) = (Mat::new(&table.cos, s, n), Mat::new(&table.sin, s, n));
        // Rows: real pixels to the kept frequencies v, real parts over imaginary parts.
        let (re, im) = rows.split_at_mut(s * n);
        let pixels = Mat::new(channel, s, s);
        matmul_here(MatMut::new(re, s, n), pixels, cos, false);
        matmul_here(MatMut::new(im, s, n), pixels, sin, false);
        im.iter_mut().for_each(|x| *x = -*x);
        // Columns: to the kept frequencies u; then only the bins of the disc.
        let forth = Mat::new(&table.forth, 2 * n, 2 * s);
        matmul_here(MatMut::new(spectrum, 2 * n, n), forth, Mat::new(rows, 2 * s, n), false);
        for part in spectrum.chunks_exact_mut(n * n) {
            part.iter_mut().zip(&filter.keep).for_each(|(x, &keep)| *x = *x * T::of(keep));
        }
        // Back along the columns, then along the rows.
        let back = Mat::new(&table.back, 2 * s, 2 * n);
        matmul_here(MatMut::new(columns, 2 * s, n), back, Mat::new(spectrum, 2 * n, n), false);
        let (re, im) = columns.split_at_mut(s * n);
        matmul_here(MatMut::new(imaginary, s, s), Mat::new(re, s, n), sin.t(), false);
        matmul_here(MatMut::new(imaginary, s, s), Mat::new(im, s, n), cos.t(), true);
        matmul_here(MatMut::new(real, s, s), Mat::new(re, s, n), cos.t(), false);
        im.iter_mut().for_each(|x| *x = -*x);
        matmul_here(MatMut::new(real, s, s), Mat::new(im, s, n), sin.t(), true);
        let per_bin = T::ONE / T::of((s * s) as f64);
        simd!(|| {
            for (re, &im) in real.iter_mut().zip(&*imaginary) {
                *re = (*re * *re + im * im).sqrt() * per_bin;
            }
        });
        real
    }
}
