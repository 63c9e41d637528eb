//! The crops that a step resamples its images to before it reads them.

use crate::ops::input::{GEOMETRY_FIELDS, Geometry};
use crate::ops::resize::{self, Interpolation};
use crate::{Arena, DType, Device, Result, Tensor, TensorRef};

/// The crops of a micro-batch, and where they are.
#[derive(Debug)]
pub(super) struct Resampled {
    interpolation: Interpolation,
    /// `(B, S, S, 3)` u8.
    crops: Tensor,
    /// `(B, 6)` i64: each crop whole; a mirrored one is mirrored already.
    geometry: Tensor,
}

impl Resampled {
    pub(super) fn new(
        arena: &mut Arena,
        [images, side]: [usize; 2],
        interpolation: Interpolation,
    ) -> Self {
        Self {
            interpolation,
            crops: arena.tensor(DType::U8, &[images, side, side, 3]),
            geometry: arena.tensor(DType::I64, &[images, GEOMETRY_FIELDS]),
        }
    }

    /// Says where the crops are, once for all steps.
    pub(super) fn place(&mut self, dev: &Device) -> Result<()> {
        let [images, side] = [0, 1].map(|axis| self.crops.shape()[axis] as i64);
        let crop = |image| Geometry {
            offset: image * 3 * side * side,
            height: side,
            width: side,
            ..Geometry::default()
        };
        let rows: Vec<_> = (0..images).map(crop).collect();
        dev.upload::<i64>(self.geometry.view_mut(), bytemuck::cast_slice(&rows))
    }

    /// Resamples a micro-batch; gives the crops back as [`input`](crate::ops::input) reads them, with their geometry.
    pub(super) fn forward<'a>(
        &'a mut self,
        dev: &Device,
        images: TensorRef<'_>,
        geometry: TensorRef<'_>,
    ) -> Result<(TensorRef<'a>, TensorRef<'a>)> {
        let Self { interpolation, crops, geometry: whole } = self;
        let interpolation = *interpolation;
        resize::forward(
            dev,
            resize::Forward { crops: crops.view_mut(), images, geometry, interpolation },
        )?;
        let bytes = crops.view().elems();
        Ok((crops.view().reshaped(&[bytes])?, whole.view()))
    }
}
