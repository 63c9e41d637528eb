//! The batch and the recorded work of a step on a GPU.

use super::step::MicroBatch;
use crate::cuda::{Gpu, Recording};
use crate::ops::input::{self, Geometry};
use crate::{DType, Device, Result, Tensor, TensorRef};

/// A micro-batch where the ops read it: in the loader's memory on the CPU, in tensors of the GPU's otherwise.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inputs<'a> {
    /// `(bytes)` u8.
    pub(super) images: TensorRef<'a>,
    /// `(B, 6)` i64.
    pub(super) geometry: TensorRef<'a>,
    /// `(B)` i64.
    pub(super) samples: TensorRef<'a>,
}

impl<'a> Inputs<'a> {
    pub(super) fn on_host(batch: MicroBatch<'a>) -> Result<Self> {
        let images = batch.samples.len();
        Ok(Self {
            images: TensorRef::new(batch.images, &[batch.images.len()])?,
            geometry: TensorRef::new(batch.geometry, &[images, input::GEOMETRY_FIELDS])?,
            samples: TensorRef::new(batch.samples, &[images])?,
        })
    }
}

/// A GPU's copy of the micro-batch. It keeps its place from step to step, so that recorded work finds it.
#[derive(Debug)]
pub(super) struct Feed {
    images: Tensor,
    geometry: Tensor,
    samples: Tensor,
}

impl Feed {
    /// Room for `images` images of `bytes` bytes together.
    pub(super) fn new(dev: &Device, images: usize, bytes: usize) -> Result<Self> {
        Ok(Self {
            images: Tensor::new(dev, DType::U8, &[bytes])?,
            geometry: Tensor::new(dev, DType::I64, &[images, input::GEOMETRY_FIELDS])?,
            samples: Tensor::new(dev, DType::I64, &[images])?,
        })
    }

    /// Whether the batch's images fit.
    pub(super) fn holds(&self, batch: MicroBatch<'_>) -> bool {
        batch.images.len() <= self.images.view().elems()
    }

    /// Copies the batch in, once its crops of `side` pixels are seen to lie inside its images: a kernel would trust them.
    pub(super) fn fill(&mut self, dev: &Device, batch: MicroBatch<'_>, side: usize) -> Result<()> {
        let rows: &[Geometry] = bytemuck::cast_slice(batch.geometry);
        input::check_geometry(rows, batch.images.len(), side)?;
        let (images, _) = self.images.view_mut().split_at(batch.images.len());
        dev.upload(images, batch.images)?;
        dev.upload(self.geometry.view_mut(), batch.geometry)?;
        dev.upload(self.samples.view_mut(), batch.samples)
    }

    pub(super) fn inputs(&self) -> Inputs<'_> {
        Inputs {
            images: self.images.view(),
            geometry: self.geometry.view(),
            samples: self.samples.view(),
        }
    }
}

/// A piece of work that is the same every time: done once as it is, so that matrix products are planned and kernels
/// loaded; recorded the second time; from then on done as a whole.
#[derive(Debug, Default)]
pub(super) enum Work {
    /// Never done.
    #[default]
    New,
    /// Done once.
    Warm,
    Recorded(Recording),
}

impl Work {
    /// Does the work that `enqueue` enqueues; never recorded unless `record` is set.
    pub(super) fn run(
        &mut self,
        gpu: &Gpu,
        record: bool,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::New => {
                enqueue()?;
                if record {
                    *self = Self::Warm;
                }
                Ok(())
            }
            Self::Warm => {
                let recording = gpu.record(enqueue)?;
                recording.replay()?;
                *self = Self::Recorded(recording);
                Ok(())
            }
            Self::Recorded(recording) => recording.replay(),
        }
    }
}
