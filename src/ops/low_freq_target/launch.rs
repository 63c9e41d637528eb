//! The filter on a GPU: bytes of the sizes PixMIM and its long-sequence form train at in half precision
//! (`kernels/low_freq_target.cu`), everything else in f32 (`kernels/low_freq_target_exact.cu`).

use half::f16;

use super::{Filter, Forward, Tables};
use crate::cuda::{DevPtr, Epilogue, Gpu, Matmul, Matrix};
use crate::tensor::carve_bytes;
use crate::{DType, Device, Error, Result, Tensor};

/// Tables in a GPU's memory.
#[derive(Debug)]
pub(super) struct GpuTables {
    /// `(2 S, 2 n)` f32: `back` of the CPU's tables. Its upper half transforms rows and columns forth, and columns back.
    back: Tensor,
    /// For the kernels in half precision, if there are any for this size and radius.
    half: Option<Half>,
}

#[derive(Debug)]
struct Half {
    size: Size,
    /// `(2, Q, S / 2)` f16.
    table: Tensor,
}

#[derive(Clone, Copy, Debug)]
enum Size {
    Of224,
    Of448,
}

/// Patches whose places among the masked ones a block can hold.
const MOST_PATCHES: usize = 4096;
/// Images that go through the split kernels together: what lies between them fits a cache of 50 MB.
const IMAGES_448: usize = 64;
/// Scratch of the f32 path, unless a single image needs more.
const EXACT_BYTES: usize = 16 << 20;

impl Size {
    fn of(size: usize, radius: f64) -> Option<Self> {
        match size {
            224 if radius == 40.0 => Some(Self::Of224),
            448 if radius == 80.0 => Some(Self::Of448),
            _ => None,
        }
    }

    /// Pixels along a side, and padded number of frequencies 0 to the radius.
    const fn dims(self) -> [usize; 2] {
        match self {
            Self::Of224 => [224, 48],
            Self::Of448 => [448, 96],
        }
    }

    /// Dynamic shared memory of its kernels, as their `BYTES`.
    const fn shared_bytes(self) -> &'static [usize] {
        match self {
            Self::Of224 => &[224_320],
            Self::Of448 => &[189_440, 218_112],
        }
    }
}

/// The sample of a half axis, of every 16, at each position of the kernels' tables.
fn sample(position: usize) -> usize {
    let in_half = position % 8;
    position / 16 * 16 + in_half / 2 * 4 + in_half % 2 + position / 8 % 2 * 2
}

/// Cosines and sines of the frequencies at the samples `x + 1/2` from the centre.
fn half_table(size: Size, radius: usize) -> Vec<f16> {
    let [side, rows] = size.dims();
    let mut table = vec![f16::ZERO; 2 * rows * side / 2];
    let (cosines, sines) = table.split_at_mut(rows * side / 2);
    for frequency in 0..=radius {
        for position in 0..side / 2 {
            let turns = frequency * (2 * sample(position) + 1) % (2 * side);
            let (sin, cos) = (std::f64::consts::PI * turns as f64 / side as f64).sin_cos();
            cosines[frequency * side / 2 + position] = f16::from_f64(cos);
            sines[frequency * side / 2 + position] = f16::from_f64(sin);
        }
    }
    table
}

impl GpuTables {
    pub(super) fn new(
        dev: &Device,
        gpu: &Gpu,
        size: usize,
        radius: f64,
        back: &[f32],
    ) -> Result<Self> {
        let mut table = Tensor::new(dev, DType::F32, &[2 * size, back.len() / (2 * size)])?;
        dev.upload(table.view_mut(), back)?;
        let has_room = |size: &Size| {
            let most = gpu.properties().shared_bytes as usize;
            size.shared_bytes().iter().all(|&bytes| bytes <= most)
        };
        let half = Size::of(size, radius).filter(has_room).map(|size| {
            let values = half_table(size, radius as usize);
            let mut table = Tensor::new(dev, DType::U8, &[2 * values.len()])?;
            dev.upload::<u8>(table.view_mut(), bytemuck::cast_slice(&values))?;
            Ok(Half { size, table })
        });
        Ok(Self { back: table, half: half.transpose()? })
    }

    pub(super) fn place(&self) -> crate::device::Place {
        self.back.view().place()
    }

    fn half(&self, pixels: DType, exact: bool) -> Option<&Half> {
        self.half.as_ref().filter(|_| pixels == DType::U8 && !exact)
    }
}

impl Filter {
    fn on_gpu(&self) -> &GpuTables {
        match &self.tables {
            Tables::Gpu(tables) => tables,
            Tables::Cpu { .. } => unreachable!("checked: the filter is where the op runs"),
        }
    }

    /// Numbers of scratch that the f32 path needs for an image.
    fn exact_elems(&self) -> usize {
        let (s, n) = (self.size, self.frequencies.len());
        3 * (2 * s * s + 2 * s * n + 4 * n * n)
    }

    /// Images that the f32 path takes at once.
    fn exact_images(&self, images: usize) -> usize {
        (EXACT_BYTES / 4 / self.exact_elems()).clamp(1, images.max(1))
    }
}

/// Numbers (f16) between the split kernels, of an image.
const fn combination_elems(size: Size) -> usize {
    let [_, frequencies] = size.dims();
    3 * 8 * frequencies * frequencies
}

pub(super) fn workspace_bytes(pixels: DType, images: usize, filter: &Filter, exact: bool) -> usize {
    // A filter of the CPU is refused when the op is called.
    let half = match &filter.tables {
        Tables::Gpu(tables) => tables.half(pixels, exact),
        Tables::Cpu { .. } => None,
    };
    match half.map(|half| half.size) {
        Some(Size::Of224) => 0,
        Some(size @ Size::Of448) => {
            carve_bytes(DType::Bf16, images.min(IMAGES_448) * combination_elems(size))
        }
        None => carve_bytes(DType::F32, filter.exact_images(images) * filter.exact_elems()),
    }
}

/// Refuses more patches than a block has room for.
pub(super) fn expect_room(args: &Forward<'_>, grid: usize) -> Result<()> {
    let half = args.filter.on_gpu().half(args.pixels.dtype(), args.exact);
    if half.is_none() || grid * grid <= MOST_PATCHES {
        return Ok(());
    }
    let why = format!(
        "is {}: {grid} x {grid} patches, of which the half-precision kernel takes {MOST_PATCHES}; set `exact`",
        args.patch_size
    );
    Err(Error::invalid("low_freq_target: patch_size", why))
}

pub(super) fn forward(gpu: &Gpu, args: Forward<'_>) -> Result<()> {
    match args.filter.on_gpu().half(args.pixels.dtype(), args.exact) {
        Some(half) => in_half(gpu, args, half),
        None => exactly(gpu, args),
    }
}

/// As in `kernels/low_freq_target.cu`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct HalfParams {
    target: DevPtr,
    pixels: DevPtr,
    ids_masked: DevPtr,
    table: DevPtr,
    combination: DevPtr,
    scale: [f32; 3],
    shift: [f32; 3],
    masked: u32,
    patch: u32,
    grid: u32,
    reciprocal: u32,
}
const _: () = assert!(size_of::<HalfParams>() == 80);

fn in_half(gpu: &Gpu, args: Forward<'_>, half: &Half) -> Result<()> {
    let [images, masked, numbers] = *args.target.shape() else { unreachable!("checked") };
    let side = args.filter.size;
    let params = HalfParams {
        target: args.target.dev_ptr(),
        pixels: args.pixels.dev_ptr(),
        ids_masked: args.ids_masked.dev_ptr(),
        table: half.table.view().dev_ptr(),
        combination: DevPtr::default(),
        scale: args.std.map(|std| (1.0 / (255.0 * std)) as f32),
        shift: std::array::from_fn(|c| (-args.mean[c] / args.std[c]) as f32),
        masked: masked as u32,
        patch: args.patch_size as u32,
        grid: (side / args.patch_size) as u32,
        // Exact for every coordinate: side * side < 2^20.
        reciprocal: (1usize << 20).div_ceil(args.patch_size) as u32,
    };
    let shared = half.size.shared_bytes();
    match half.size {
        Size::Of224 => gpu.launch("low_freq_target_224", images, 384, shared[0], &params),
        Size::Of448 => {
            let at_once = images.min(IMAGES_448);
            let elems = at_once * combination_elems(half.size);
            let (combination, _) = args.workspace.carve_tensor(DType::Bf16, elems);
            for first in (0..images).step_by(at_once) {
                let count = at_once.min(images - first);
                let params = HalfParams {
                    target: params.target.offset(first * masked * numbers * 4),
                    pixels: params.pixels.offset(first * 3 * side * side),
                    ids_masked: params.ids_masked.offset(first * masked * 4),
                    combination: combination.dev_ptr(),
                    ..params
                };
                gpu.launch("low_freq_target_448_forth", count * 6, 384, shared[0], &params)?;
                gpu.launch("low_freq_target_448_back", count * 7, 384, shared[1], &params)?;
            }
            Ok(())
        }
    }
}

/// As in `kernels/low_freq_target_exact.cu`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct CentreParams {
    centred: DevPtr,
    pixels: DevPtr,
    count: u64,
}
const _: () = assert!(size_of::<CentreParams>() == 24);

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct KeepParams {
    spectrum: DevPtr,
    count: u64,
    limit: i64,
    frequencies: u32,
    first: i32,
    half_bin: u32,
    per_pixel: f32,
}
const _: () = assert!(size_of::<KeepParams>() == 40);

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct GatherParams {
    target: DevPtr,
    filtered: DevPtr,
    ids_masked: DevPtr,
    count: u64,
    mean: [f32; 3],
    std: [f32; 3],
    size: u32,
    patch: u32,
    grid: u32,
    masked: u32,
}
const _: () = assert!(size_of::<GatherParams>() == 72);

const THREADS: u32 = 256;

fn exactly(gpu: &Gpu, args: Forward<'_>) -> Result<()> {
    let Forward { target, pixels, ids_masked, filter, workspace, .. } = args;
    let [images, masked, numbers] = *target.shape() else { unreachable!("checked") };
    let (s, n) = (filter.size, filter.frequencies.len());
    let centre = match pixels.dtype() {
        DType::U8 => "low_freq_target_centre_u8",
        _ => "low_freq_target_centre_f32",
    };
    let at_once = filter.exact_images(images);
    let (planes, _) = workspace.carve_tensor(DType::F32, at_once * filter.exact_elems());
    let (planes, rest) = planes.split_at(at_once * 6 * s * s);
    let (rows, spectrum) = rest.split_at(at_once * 6 * s * n);
    let (planes, rows, spectrum) = (planes.dev_ptr(), rows.dev_ptr(), spectrum.dev_ptr());
    let dense = |ptr, cols: usize, batch_stride| Matrix {
        ptr,
        dtype: DType::F32,
        row_stride: cols,
        batch_stride,
        transposed: false,
    };
    let transposed = |matrix| Matrix { transposed: true, ..matrix };
    let back = dense(filter.on_gpu().back.view().dev_ptr(), 2 * n, 0);
    let product = |[m, n, k]: [usize; 3], batch, a, b, out| {
        let epilogue = Epilogue::None;
        let product = Matmul { m, n, k, batch, a, b, out, bias: None, add: None, epilogue };
        gpu.driver().matmul(&product)
    };
    let blocks = |count: usize| count.div_ceil(THREADS as usize);
    for first in (0..images).step_by(at_once) {
        let count = at_once.min(images - first);
        let batch = 3 * count;
        let elems = batch * s * s;
        let params = CentreParams {
            centred: planes,
            pixels: pixels.dev_ptr().offset(first * 3 * s * s * pixels.dtype().size_bytes()),
            count: elems as u64,
        };
        gpu.launch(centre, blocks(elems), THREADS, 0, &params)?;
        // Rows forth, real parts beside imaginary parts; columns forth, their cosines above their negative sines.
        product([batch * s, 2 * n, s], 1, dense(planes, s, 0), back, dense(rows, 2 * n, 0))?;
        let each_rows = dense(rows, 2 * n, 2 * n * s);
        let each_spectrum = dense(spectrum, 2 * n, 4 * n * n);
        product([2 * n, 2 * n, s], batch, transposed(back), each_rows, each_spectrum)?;
        let params = KeepParams {
            spectrum,
            count: (batch * n * n) as u64,
            limit: (4.0 * filter.radius * filter.radius) as i64,
            frequencies: n as u32,
            first: filter.frequencies[0] as i32,
            half_bin: u32::from(s.is_multiple_of(2)),
            per_pixel: (1.0 / (s * s) as f64) as f32,
        };
        gpu.launch("low_freq_target_keep", blocks(batch * n * n), THREADS, 0, &params)?;
        // Columns back, rows back.
        product([s, 2 * n, 2 * n], batch, back, each_spectrum, each_rows)?;
        let (rows, filtered) = (dense(rows, 2 * n, 0), dense(planes, 2 * s, 0));
        product([batch * s, 2 * s, 2 * n], 1, rows, transposed(back), filtered)?;
        let elems = count * masked * numbers;
        let params = GatherParams {
            target: target.dev_ptr().offset(first * masked * numbers * 4),
            filtered: planes,
            ids_masked: ids_masked.dev_ptr().offset(first * masked * 4),
            count: elems as u64,
            mean: args.mean.map(|x| x as f32),
            std: args.std.map(|x| x as f32),
            size: s as u32,
            patch: args.patch_size as u32,
            grid: (s / args.patch_size) as u32,
            masked: masked as u32,
        };
        gpu.launch("low_freq_target_gather", blocks(elems), THREADS, 0, &params)?;
    }
    Ok(())
}
