//! From bytes to numbers: crop, flip, normalise and patchify uint8 images in one pass.
//!
//! For pixel `x` on [0, 1] of the crop: `patches` and `target` hold `(x - mean) / std` of the kept and of the masked
//! patches, `pixels` holds `x` of the whole crop. A patch of the encoder's input runs (channel, row, column), as a
//! convolution's weight does; a patch of the target runs (row, column, channel), as MAE's `patchify` does.
//!
//! On a GPU `pixels` holds the bytes themselves, and nobody looks at `geometry` there: see [`check_geometry`].

use super::cost::{self, Cost, InputTarget};
use super::{expect_colours, expect_ids, expect_nonzero, for_real, patch_numbers};
use crate::device::Call;
pub use crate::scalar::reflect;
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// Which `S x S` crop of an image of bytes the network sees.
///
/// Pixel `(y, x)` of the crop is pixel `(reflect(top + y, height), reflect(left + x', width))` of the image, where
/// `x'` is `x`, or `S - 1 - x` if `flip` is set. A row of [`Forward::geometry`], words of 64 bits in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Geometry {
    /// Byte of the batch's `images` at which the image starts.
    pub offset: i64,
    /// Rows of the image.
    pub height: i64,
    /// Columns of the image.
    pub width: i64,
    /// First row of the crop; negative within the reflected border.
    pub top: i64,
    /// First column of the crop; negative within the reflected border.
    pub left: i64,
    /// 1: the crop is mirrored left to right, after it was taken; 0: it is not.
    pub flip: i64,
}

/// Fields of a [`Geometry`].
pub const GEOMETRY_FIELDS: usize = size_of::<Geometry>() / size_of::<i64>();

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, K, E)`, (channel, row, column). Overwritten.
    pub patches: TensorMut<'a>,
    /// What the loss will compare with.
    pub target: Target<'a>,
    /// `(bytes)` u8: the images of the batch, one after another, each `(height, width, 3)` RGB.
    pub images: TensorRef<'a>,
    /// `(B, 6)` i64, a [`Geometry`] each. A crop may reach over an edge by less than the image's extent.
    pub geometry: TensorRef<'a>,
    /// `(B, K)` i32, all different in an image.
    pub ids_keep: TensorRef<'a>,
    /// Mean of the colours, RGB on [0, 1].
    pub mean: [f64; 3],
    /// Standard deviation of the colours.
    pub std: [f64; 3],
    /// Pixels along a side of a patch (P).
    pub patch_size: usize,
}

/// What the loss will compare with.
#[derive(Debug)]
pub enum Target<'a> {
    /// The image itself (MAE).
    Raw {
        /// `(B, M, E)`, (row, column, channel). Overwritten.
        target: TensorMut<'a>,
        /// `(B, M)` i32, all different in an image.
        ids_masked: TensorRef<'a>,
    },
    /// A filtered image (PixMIM), made by [`super::low_freq_target`] from the pixels of the whole crop.
    Filtered {
        /// `(B, 3, S, S)`, on [0, 1], or on a GPU u8 on 0 to 255. Overwritten.
        pixels: TensorMut<'a>,
    },
}

/// Reads the crops.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] unless the arguments are as their fields say; [`Error::Invalid`] for a
/// geometry, id or colour outside its bounds, and for patches of which a GPU's shared memory does not hold a row.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("input::forward", || args.cost(dims));
    match dev {
        Device::Cpu(_) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims)),
        Device::Cuda(gpu) => launch::forward(gpu, args, dims)?,
    }
    Ok(())
}

/// Refuses images that do not lie within `bytes` and crops of `side` (S) that leave them by more than one reflection.
///
/// [`forward`] asks this of geometry on the CPU. On a GPU it cannot, and reads what it is told to: ask before copying
/// `rows` there.
///
/// # Errors
/// [`Error::Invalid`], naming the image.
pub fn check_geometry(rows: &[Geometry], bytes: usize, side: usize) -> Result<()> {
    expect_geometry("input::forward: geometry", rows, bytes, |row| row.reaches(side as i64))
}

/// Refuses images that do not lie within `bytes`, and rows that are not as `fits` asks.
pub(super) fn expect_geometry(
    arg: &str,
    rows: &[Geometry],
    bytes: usize,
    fits: impl Fn(&Geometry) -> bool,
) -> Result<()> {
    match rows.iter().position(|row| !(row.lies_within(bytes as i64) && fits(row))) {
        None => Ok(()),
        Some(image) => {
            let row = rows[image];
            let why = format!("of image {image} does not fit: {row:?} in {bytes} bytes");
            Err(Error::invalid(arg, why))
        }
    }
}

#[derive(Clone, Copy)]
struct Dims {
    kept: usize,
    /// Patches along a side of the crop.
    grid: usize,
    patch_size: usize,
    dtype: DType,
}

impl Forward<'_> {
    fn cost(&self, dims: Dims) -> Cost {
        let Dims { kept, grid, patch_size, dtype } = dims;
        let images = self.geometry.shape()[0];
        let target = match &self.target {
            Target::Raw { .. } => InputTarget::Raw,
            Target::Filtered { pixels } => InputTarget::Filtered(pixels.dtype()),
        };
        cost::input_forward(dtype, [images, grid * patch_size, patch_size, kept], target)
    }

    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "input::forward", dev };
        let dtype = self.patches.expect_real(call, "patches")?;
        let patch_size = self.patch_size;
        let [images, kept, _] = self.patches.dims(call, "patches", "(B, K, E)")?;
        let numbers = patch_numbers(call, patch_size)?;
        expect_nonzero(call, "patches", &[images, kept, numbers])?;
        expect_colours(call, self.mean, self.std)?;
        self.patches.expect(call, "patches", dtype, &[images, kept, numbers])?;
        self.ids_keep.expect(call, "ids_keep", DType::I32, &[images, kept])?;
        self.geometry.expect(call, "geometry", DType::I64, &[images, GEOMETRY_FIELDS])?;
        self.images.expect(call, "images", DType::U8, &[self.images.elems()])?;
        let grid = match &self.target {
            Target::Raw { target, ids_masked } => {
                let [_, masked] = ids_masked.dims(call, "target.ids_masked", "(B, M)")?;
                ids_masked.expect(call, "target.ids_masked", DType::I32, &[images, masked])?;
                target.expect(call, "target.target", dtype.wide(), &[images, masked, numbers])?;
                let grid = (kept + masked).isqrt();
                if grid * grid != kept + masked {
                    let (arg, found) = ("target.ids_masked", vec![images, masked]);
                    let expected = format!("(B, M) with a square number M + {kept} of patches");
                    return Err(Error::Shape { op: call.op, arg, expected, found });
                }
                expect_ids(call, "target.ids_masked", ids_masked, grid * grid)?;
                grid
            }
            Target::Filtered { pixels } => {
                let [_, _, side, _] = pixels.dims(call, "target.pixels", "(B, 3, S, S)")?;
                let dtype = match dev {
                    Device::Cpu(_) => dtype,
                    Device::Cuda(_) => DType::U8,
                };
                pixels.expect(call, "target.pixels", dtype, &[images, 3, side, side])?;
                if side == 0 || side % patch_size != 0 {
                    let (arg, found) = ("target.pixels", pixels.shape().to_vec());
                    let expected = format!("(B, 3, S, S) with S a multiple of {patch_size}");
                    return Err(Error::Shape { op: call.op, arg, expected, found });
                }
                side / patch_size
            }
        };
        expect_ids(call, "ids_keep", &self.ids_keep, grid * grid)?;
        match dev {
            Device::Cpu(_) => {
                let rows = bytemuck::cast_slice(self.geometry.as_slice::<i64>());
                check_geometry(rows, self.images.elems(), grid * patch_size)?;
            }
            Device::Cuda(gpu) => launch::expect_room(gpu, grid, patch_size)?,
        }
        Ok(Dims { kept, grid, patch_size, dtype })
    }
}

impl Geometry {
    /// Whether the image's bytes are there, and the flip is one.
    fn lies_within(&self, bytes: i64) -> bool {
        let end = self
            .height
            .checked_mul(self.width)
            .and_then(|n| n.checked_mul(3)?.checked_add(self.offset));
        self.offset >= 0
            && (1..1 << 30).contains(&self.height)
            && (1..1 << 30).contains(&self.width)
            && end.is_some_and(|end| end <= bytes)
            && (self.flip == 0 || self.flip == 1)
    }

    /// Whether the crop lies where one reflection reaches.
    fn reaches(&self, side: i64) -> bool {
        let reaches = |from: i64, extent: i64| {
            from > -extent && from.checked_add(side).is_some_and(|end| end < 2 * extent)
        };
        reaches(self.top, self.height) && reaches(self.left, self.width)
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Dims, Forward, Geometry, Target, reflect};
    use crate::cpu::Real;
    use crate::scalar::patch_corner;

    /// A crop, read through its geometry.
    struct Crop<'a> {
        image: &'a [u8],
        at: Geometry,
        side: i64,
    }

    impl Crop<'_> {
        /// Row `y` of the crop, within the image's bytes.
        fn row(&self, y: usize) -> &[u8] {
            let bytes = 3 * self.at.width as usize;
            &self.image[reflect(self.at.top + y as i64, self.at.height as usize) * bytes..][..bytes]
        }

        /// Where pixel `x` of a row of the crop starts in [`row`](Self::row).
        fn column(&self, x: usize) -> usize {
            let x = if self.at.flip == 1 { self.side - 1 - x as i64 } else { x as i64 };
            3 * reflect(self.at.left + x, self.at.width as usize)
        }
    }

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims) {
        let Dims { kept, grid, patch_size, .. } = dims;
        let side = grid * patch_size;
        let numbers = 3 * patch_size * patch_size;
        let bytes = args.images.as_slice::<u8>();
        let crops: &[Geometry] = bytemuck::cast_slice(args.geometry.as_slice::<i64>());
        let crop = |b: usize| {
            let at = crops[b];
            Crop { image: &bytes[at.offset as usize..], at, side: side as i64 }
        };
        // All values a byte can stand for, in each channel.
        let unit: [T; 256] = std::array::from_fn(|byte| T::of(byte as f64 / 255.0));
        let normal: [[T; 256]; 3] = std::array::from_fn(|c| {
            let (mean, std) = (args.mean[c], args.std[c]);
            std::array::from_fn(|byte| T::of((byte as f64 / 255.0 - mean) / std))
        });
        let ids = args.ids_keep.as_slice::<i32>().par_chunks(kept);
        let patches = args.patches.into_slice::<T>().par_chunks_mut(kept * numbers);
        patches.zip(ids).enumerate().for_each(|(b, (patches, ids))| {
            let crop = crop(b);
            for (patch, &id) in patches.chunks_exact_mut(numbers).zip(ids) {
                let (top, left) = patch_corner(id as usize, grid, patch_size);
                let (red, rest) = patch.split_at_mut(numbers / 3);
                let (green, blue) = rest.split_at_mut(numbers / 3);
                for y in 0..patch_size {
                    let row = crop.row(top + y);
                    for x in 0..patch_size {
                        let (from, to) = (crop.column(left + x), y * patch_size + x);
                        red[to] = normal[0][usize::from(row[from])];
                        green[to] = normal[1][usize::from(row[from + 1])];
                        blue[to] = normal[2][usize::from(row[from + 2])];
                    }
                }
            }
        });
        match args.target {
            Target::Raw { target, ids_masked } => {
                let masked = ids_masked.shape()[1];
                let ids = ids_masked.as_slice::<i32>().par_chunks(masked.max(1));
                let target = target.into_slice::<T>().par_chunks_mut((masked * numbers).max(1));
                target.zip(ids).enumerate().for_each(|(b, (target, ids))| {
                    let crop = crop(b);
                    for (patch, &id) in target.chunks_exact_mut(numbers).zip(ids) {
                        let (top, left) = patch_corner(id as usize, grid, patch_size);
                        for (to, pixel) in patch.chunks_exact_mut(3).enumerate() {
                            let row = crop.row(top + to / patch_size);
                            let from = crop.column(left + to % patch_size);
                            for (c, x) in pixel.iter_mut().enumerate() {
                                *x = normal[c][usize::from(row[from + c])];
                            }
                        }
                    }
                });
            }
            Target::Filtered { pixels } => {
                let pixels = pixels.into_slice::<T>().par_chunks_mut(3 * side * side);
                pixels.enumerate().for_each(|(b, pixels)| {
                    let crop = crop(b);
                    for y in 0..side {
                        let row = crop.row(y);
                        for x in 0..side {
                            let from = crop.column(x);
                            for c in 0..3 {
                                pixels[(c * side + y) * side + x] =
                                    unit[usize::from(row[from + c])];
                            }
                        }
                    }
                });
            }
        }
    }
}

mod launch {
    use super::{Dims, Forward, Target};
    use crate::cuda::{DevPtr, Gpu};
    use crate::{DType, Error, Result};

    /// As in `kernels/input.cu`.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct Params {
        patches: DevPtr,
        target: DevPtr,
        pixels: DevPtr,
        images: DevPtr,
        geometry: DevPtr,
        ids_keep: DevPtr,
        ids_masked: DevPtr,
        scale: [[f32; 2]; 3],
        shift: [[f32; 2]; 3],
        kept: u32,
        masked: u32,
        grid: u32,
        patch_size: u32,
        pitch: u32,
        unused: u32,
    }
    const _: () = assert!(size_of::<Params>() == 128);

    const BLOCK: u32 = 256;

    /// Bytes of a row of a crop in shared memory: it starts anywhere between two aligned addresses.
    fn pitch(side: usize) -> usize {
        (3 * side + 15).next_multiple_of(16)
    }

    /// Rows of one row of patches, and the three tables.
    fn shared_bytes(grid: usize, patch_size: usize) -> usize {
        let side = grid * patch_size;
        patch_size * pitch(side) + size_of::<u32>() * (patch_size + side + grid)
    }

    /// Refuses patches of which shared memory does not hold a row.
    pub(super) fn expect_room(gpu: &Gpu, grid: usize, patch_size: usize) -> Result<()> {
        let (needed, most) = (shared_bytes(grid, patch_size), gpu.properties().shared_bytes);
        if needed <= most as usize {
            return Ok(());
        }
        let why = format!(
            "is {patch_size}: a row of {grid} patches needs {needed} bytes of shared memory, of which this GPU has \
             {most}; take smaller patches or crops"
        );
        Err(Error::invalid("input::forward: patch_size", why))
    }

    /// The nearest f32, and what it lacks.
    fn in_two_parts(x: f64) -> [f32; 2] {
        let high = x as f32;
        [high, (x - f64::from(high)) as f32]
    }

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, dims: Dims) -> Result<()> {
        let Dims { kept, grid, patch_size, dtype } = dims;
        let none = DevPtr::default();
        let (target, ids_masked, pixels, masked) = match &args.target {
            Target::Raw { target, ids_masked } => {
                (target.dev_ptr(), ids_masked.dev_ptr(), none, ids_masked.shape()[1])
            }
            Target::Filtered { pixels } => (none, none, pixels.dev_ptr(), 0),
        };
        let params = Params {
            patches: args.patches.dev_ptr(),
            target,
            pixels,
            images: args.images.dev_ptr(),
            geometry: args.geometry.dev_ptr(),
            ids_keep: args.ids_keep.dev_ptr(),
            ids_masked,
            scale: args.std.map(|std| in_two_parts(1.0 / (255.0 * std))),
            shift: std::array::from_fn(|c| in_two_parts(-args.mean[c] / args.std[c])),
            kept: kept as u32,
            masked: masked as u32,
            grid: grid as u32,
            patch_size: patch_size as u32,
            pitch: pitch(grid * patch_size) as u32,
            unused: 0,
        };
        let kernel = match dtype {
            DType::Bf16 => "input_forward_bf16",
            _ => "input_forward_f32",
        };
        let blocks = args.patches.shape()[0] * grid;
        gpu.launch(kernel, blocks, BLOCK, shared_bytes(grid, patch_size), &params)
    }
}
