//! Rectangles of bytes resampled to square crops, bit for bit as Pillow does it (`Image.resize` with `BICUBIC` or
//! `BILINEAR`; releases before 13, which takes the vertical pass first where the height shrinks much more than the
//! width).
//!
//! Each axis is a weighted sum over a window that grows with the reduction, so that shrinking is antialiased. Weights
//! are fixed point with 22 fractional bits; the horizontal pass comes first and rounds to bytes before the
//! vertical one. Not to be confused with `torch.nn.functional.interpolate`, whose bicubic is another (a = -0.75) and
//! which is not antialiased by default.
//!
//! The CPU and a GPU give the same bytes. Random Resized Crop is this: rectangles that differ from epoch to epoch.

mod cpu;

#[cfg(feature = "train")]
pub(crate) use cpu::{Rectangle, resample};

use super::input::{GEOMETRY_FIELDS, Geometry, expect_geometry};
use super::{cost, expect_nonzero};
use crate::device::Call;
use crate::{DType, Device, Result, TensorMut, TensorRef};

/// Interpolation of resizing, both as Pillow does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "train", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "train", serde(rename_all = "snake_case"))]
pub enum Interpolation {
    /// Cubic, a = -0.5, antialiased.
    Bicubic,
    /// Linear, antialiased.
    Bilinear,
}

/// Most pixels of a rectangle's side.
pub const MOST_SIDE: usize = 1 << 20;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(B, S, S, 3)` u8, RGB. Overwritten.
    pub crops: TensorMut<'a>,
    /// `(bytes)` u8: the rectangles of the batch, one after another, each `(height, width, 3)` RGB.
    pub images: TensorRef<'a>,
    /// `(B, 6)` i64, a [`Geometry`] each: all of the image is resampled, so `top` and `left` are 0; `flip` mirrors the
    /// crop. On a GPU nobody looks: see [`check_geometry`].
    pub geometry: TensorRef<'a>,
    /// How pixels are weighted.
    pub interpolation: Interpolation,
}

/// Resamples each rectangle to a crop.
///
/// # Errors
/// [`crate::Error::Shape`] or [`crate::Error::DType`] unless the arguments are as their fields say;
/// [`crate::Error::Invalid`] for a geometry that [`check_geometry`] refuses.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let side = args.check(dev)?;
    // What the rectangles have of the images' bytes stands in geometry, which may be on a GPU: all of them, most likely.
    let _span = dev.span("resize::forward", || {
        cost::resize_forward([args.crops.shape()[0], side], args.images.elems() / 3)
    });
    match dev {
        Device::Cpu(_) => cpu::forward(args, side),
        Device::Cuda(gpu) => launch::forward(gpu, args, side)?,
    }
    Ok(())
}

/// Refuses rectangles that do not lie within `bytes`, are larger than [`MOST_SIDE`], or are to be cropped besides.
///
/// [`forward`] asks this of geometry on the CPU. On a GPU it cannot, and reads what it is told to: ask before copying
/// `rows` there.
///
/// # Errors
/// [`crate::Error::Invalid`], naming the image.
pub fn check_geometry(rows: &[Geometry], bytes: usize) -> Result<()> {
    let is_side = |side| (1..=MOST_SIDE as i64).contains(&side);
    expect_geometry("resize::forward: geometry", rows, bytes, |row| {
        is_side(row.height) && is_side(row.width) && row.top == 0 && row.left == 0
    })
}

impl Forward<'_> {
    /// The crops' side (S).
    fn check(&self, dev: &Device) -> Result<usize> {
        let call = Call { op: "resize::forward", dev };
        let [images, side, _, _] = self.crops.dims(call, "crops", "(B, S, S, 3)")?;
        expect_nonzero(call, "crops", &[images, side])?;
        self.crops.expect(call, "crops", DType::U8, &[images, side, side, 3])?;
        self.images.expect(call, "images", DType::U8, &[self.images.elems()])?;
        self.geometry.expect(call, "geometry", DType::I64, &[images, GEOMETRY_FIELDS])?;
        if let Device::Cpu(_) = dev {
            let rows = bytemuck::cast_slice(self.geometry.as_slice::<i64>());
            check_geometry(rows, self.images.elems())?;
        }
        Ok(side)
    }
}

mod launch {
    use super::{Forward, Interpolation};
    use crate::Result;
    use crate::cuda::{DevPtr, Gpu};

    /// As in `kernels/resize.cu`.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct Params {
        crops: DevPtr,
        images: DevPtr,
        geometry: DevPtr,
        side: u32,
        tiles: u32,
        bicubic: u32,
        unused: u32,
    }
    const _: () = assert!(size_of::<Params>() == 40);

    const BLOCK: u32 = 256;
    /// Pixels of a side of the part of a crop that a block makes.
    const TILE: usize = 32;

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, side: usize) -> Result<()> {
        let tiles = side.div_ceil(TILE);
        let blocks = args.crops.shape()[0] * tiles * tiles;
        let params = Params {
            crops: args.crops.dev_ptr(),
            images: args.images.dev_ptr(),
            geometry: args.geometry.dev_ptr(),
            side: side as u32,
            tiles: tiles as u32,
            bicubic: u32::from(args.interpolation == Interpolation::Bicubic),
            unused: 0,
        };
        gpu.launch("resize_forward", blocks, BLOCK, 0, &params)
    }
}
