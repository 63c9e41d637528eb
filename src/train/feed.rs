//! The batch and the recorded work of a step on a GPU.

use super::step::Inputs;
use crate::cuda::{Gpu, Recording};
use crate::device::Place;
use crate::ops::input::{GEOMETRY_FIELDS, Geometry};
use crate::{DType, Device, HostBuffer, Result, Tensor};

/// A GPU's copy of the micro-batch. It keeps its place from step to step, so that recorded work finds it.
#[derive(Debug)]
pub(super) struct Feed {
    images: Tensor,
    geometry: Tensor,
    samples: Tensor,
    epoch: Tensor,
}

impl Feed {
    /// Room for `images` images of `bytes` bytes together.
    pub(super) fn new(dev: &Device, images: usize, bytes: usize) -> Result<Self> {
        Ok(Self {
            images: Tensor::new(dev, DType::U8, &[bytes])?,
            geometry: Tensor::new(dev, DType::I64, &[images, GEOMETRY_FIELDS])?,
            samples: Tensor::new(dev, DType::I64, &[images])?,
            epoch: Tensor::new(dev, DType::I64, &[1])?,
        })
    }

    /// Whether the batch's images fit.
    pub(super) fn holds(&self, batch: Inputs<'_>) -> bool {
        batch.images.elems() <= self.images.view().elems()
    }

    /// Copies the batch in; `buffer` holds its images if they are in one. `judge` is asked of its geometry and bytes whether
    /// it leads outside its images, since a kernel would trust it; of geometry that is on the GPU already nobody knows.
    pub(super) fn fill(
        &mut self,
        dev: &Device,
        batch: Inputs<'_>,
        buffer: Option<&HostBuffer>,
        judge: impl FnOnce(&[Geometry], usize) -> Result<()>,
    ) -> Result<()> {
        dev.copy(self.geometry.view_mut(), batch.geometry)?;
        if batch.geometry.place() == Place::Host {
            let rows = bytemuck::cast_slice(batch.geometry.as_slice::<i64>());
            judge(rows, batch.images.elems())?;
        }
        let (images, _) = self.images.view_mut().split_at(batch.images.elems());
        match buffer {
            Some(buffer) => dev.upload_buffer(images, buffer)?,
            None => dev.copy(images, batch.images)?,
        }
        dev.copy(self.samples.view_mut(), batch.samples)?;
        dev.copy(self.epoch.view_mut(), batch.epoch)
    }

    pub(super) fn inputs(&self) -> Inputs<'_> {
        Inputs {
            images: self.images.view(),
            geometry: self.geometry.view(),
            samples: self.samples.view(),
            epoch: self.epoch.view(),
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

#[cfg(all(test, pixmim_simt))]
mod tests {
    use super::*;
    use crate::Error;
    use crate::cuda::SimtOptions;

    #[test]
    fn work_that_cannot_be_recorded_is_told_and_the_next_goes_on() {
        let gpu = Gpu::simt(SimtOptions::default()).unwrap();
        let dev = Device::Cuda(gpu.clone());
        let mut tensor = Tensor::holding(&dev, &[1, 2, 3], &[3]).unwrap();
        let mut work = Work::default();
        work.run(&gpu, true, || Ok(())).unwrap();
        let error = work.run(&gpu, true, || Err(Error::invalid("op", "refuses"))).unwrap_err();
        assert_eq!(error.to_string(), "`op` refuses");
        let copied = work.run(&gpu, true, || dev.upload(tensor.view_mut(), &[4, 5, 6]));
        assert!(matches!(copied, Err(Error::Gpu { .. })), "{copied:?}");
        // Nothing is being recorded any more.
        assert_eq!(dev.download::<i32>(tensor.view()).unwrap(), [1, 2, 3]);
        for _ in 0..2 {
            dev.upload(tensor.view_mut(), &[7, 8, 9]).unwrap();
            work.run(&gpu, true, || dev.clear(tensor.view_mut())).unwrap();
            assert!(matches!(work, Work::Recorded(_)), "{work:?}");
            assert_eq!(dev.download::<i32>(tensor.view()).unwrap(), [0; 3]);
        }
    }
}
