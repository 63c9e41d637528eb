//! A micro-batch, and its way to where the step reads it: on the CPU where it is, on a GPU in the [`Feed`].

use super::Trainer;
use crate::data::loader::Batch;
use crate::ops::{input, resize};
use crate::profile;
use crate::train::feed::{Feed, Work};
use crate::{Device, Error, HostBuffer, Result, TensorRef};

/// The images of one micro-batch, as [`input`] reads them, or [`resize`] if the settings say so.
#[derive(Clone, Copy, Debug)]
pub struct MicroBatch<'a> {
    /// Bytes of all images.
    pub images: &'a [u8],
    /// Six numbers for each image.
    pub geometry: &'a [i64],
    /// Id of each image: decides its mask, with seed and epoch.
    pub samples: &'a [i64],
    /// Epoch of the step.
    pub epoch: u32,
}

impl<'a> From<&'a Batch> for MicroBatch<'a> {
    fn from(batch: &'a Batch) -> Self {
        Self {
            images: &batch.images,
            geometry: bytemuck::cast_slice(&batch.geometry),
            samples: &batch.samples,
            epoch: batch.epoch,
        }
    }
}

/// A micro-batch as tensors, each in the host's memory or the device's.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `(bytes)` u8: the images, one after another.
    pub images: TensorRef<'a>,
    /// `(B, 6)` i64. Checked on the host; on a GPU nobody looks, so it must be as [`input::check_geometry`] asks, or
    /// [`resize::check_geometry`] if images are resampled.
    pub geometry: TensorRef<'a>,
    /// `(B)` i64: decides each image's mask, with seed and epoch.
    pub samples: TensorRef<'a>,
    /// `(1)` i64: epoch of the step, below 2^28.
    pub epoch: TensorRef<'a>,
}

impl<'a> Inputs<'a> {
    pub(super) fn on_host(batch: MicroBatch<'a>, epoch: &'a [i64; 1]) -> Result<Self> {
        let images = batch.samples.len();
        Ok(Self {
            images: TensorRef::new(batch.images, &[batch.images.len()])?,
            geometry: TensorRef::new(batch.geometry, &[images, input::GEOMETRY_FIELDS])?,
            samples: TensorRef::new(batch.samples, &[images])?,
            epoch: TensorRef::new(epoch, &[1])?,
        })
    }
}

impl Trainer {
    /// Does a piece of a step that reads a batch, on a GPU from its place there. `images` holds the batch's images if they are
    /// in a buffer.
    pub(super) fn run_batch(
        &mut self,
        batch: Inputs<'_>,
        images: Option<&HostBuffer>,
        micro_batches: usize,
        work: impl Fn(&mut Self) -> &mut Work,
        enqueue: impl FnOnce(&mut Self, Inputs<'_>) -> Result<()>,
    ) -> Result<()> {
        if micro_batches == 0 {
            return Err(Error::invalid("micro_batches", "is 0; a step has at least one"));
        }
        self.forwarded = false;
        if let Device::Cpu(_) = self.dev {
            return enqueue(self, batch);
        }
        let mut feed = self.take_feed(batch, images.is_some(), micro_batches)?;
        let judge = |rows: &[input::Geometry], bytes| match self.resampled {
            Some(_) => resize::check_geometry(rows, bytes),
            None => input::check_geometry(rows, bytes, self.mae.config().image_size),
        };
        let done = feed
            .fill(&self.dev, batch, images, judge)
            .and_then(|()| self.run(work, |step| enqueue(step, feed.inputs())));
        self.feed = Some(feed);
        done
    }

    /// A GPU's place for the batch: the one before, which recorded work reads, if it fits. Batches are alike if `all_alike`.
    fn take_feed(
        &mut self,
        batch: Inputs<'_>,
        all_alike: bool,
        micro_batches: usize,
    ) -> Result<Feed> {
        let fits = self.feed.as_ref().is_some_and(|feed| feed.holds(batch));
        if !fits || self.micro_batches != micro_batches {
            self.accumulate_work = Work::New;
            self.forward_work = Work::New;
            self.micro_batches = micro_batches;
        }
        match self.feed.take() {
            Some(feed) if fits => return Ok(feed),
            // Before the larger one is made: there need not be room for both.
            Some(_in_use) => self.synchronize()?,
            None => {}
        }
        // Photos differ in size: some room, so that a larger batch need not be recorded anew.
        let bytes = batch.images.elems();
        let room = if all_alike { 0 } else { bytes / 4 };
        Feed::new(&self.home, self.settings.micro_batch, bytes + room)
    }

    /// Does a piece of a step: on a GPU as recorded work, if the settings say so and nobody asks what its ops take.
    pub(super) fn run(
        &mut self,
        work: impl Fn(&mut Self) -> &mut Work,
        enqueue: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let gpu = match self.dev.clone() {
            Device::Cuda(gpu) if !profile::is_collecting() => gpu,
            _ => return enqueue(self),
        };
        let (mut taken, record) = (std::mem::take(work(self)), self.settings.record);
        let done = taken.run(&gpu, record, || enqueue(self));
        *work(self) = taken;
        done
    }
}
