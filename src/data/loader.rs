//! The loader: worker threads that decode, resize and crop ahead of the training loop, and micro-batches in order.
//!
//! What a batch holds is a function of the seed and of its place in the run. It depends neither on the number of threads
//! nor on what was loaded before: a resumed run sees the same batches.
//!
//! A batch is made in the memory that a GPU reads it from. Each image has its place there, of a size that no crop exceeds,
//! and the worker that has decoded it copies what the crop shows of it, once.

mod worker;

use std::any::Any;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub use self::worker::max_bad;
use self::worker::{Shared, work};
use crate::data::augment::{self, Geometry};
use crate::data::source::{BadImage, Source};
use crate::rng::{Purpose, Stream};
use crate::train::config::{Crop, Interpolation};
use crate::{Device, Error, HostBuffer, Result};

/// What is loaded, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderConfig {
    /// Side of the square that the network sees, in pixels.
    pub image_size: usize,
    /// How an image becomes a square.
    pub crop: Crop,
    /// Reflected border of the simple crop, in pixels.
    pub padding: usize,
    /// Smallest and largest share of the area that the random resized crop keeps.
    pub crop_scale: [f64; 2],
    /// Interpolation of resizing.
    pub interpolation: Interpolation,
    /// Probability of a horizontal flip.
    pub flip: f64,
    /// Seed of the order, the crops and the flips.
    pub seed: u64,
    /// Images per step.
    pub global_batch: usize,
    /// Images per batch that [`Loader::next`] gives; divides `global_batch`.
    pub micro_batch: usize,
    /// Worker threads.
    pub threads: usize,
    /// Micro-batches that are made ahead, the one being waited for included.
    pub prefetch: usize,
    /// Bytes of resized images that are kept from one epoch to the next. Only the simple crop has any: its resize does
    /// not depend on the epoch.
    pub cache_bytes: usize,
    /// Loading fails when more than this share of the images cannot be read, and more than one.
    pub max_bad_share: f64,
    /// Who resizes the random resized crop.
    pub resample: Resample,
}

/// Who resizes the rectangle of a random resized crop to the square that the network sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resample {
    /// The loader's threads: the batch holds squares.
    #[default]
    OnHost,
    /// Whoever takes the batch: it holds the rectangles, all of each to be resized. One of more than
    /// [`MOST_SQUARES`] times the pixels of the square has been resized already, to where that changes nothing any more.
    OnDevice,
}

/// Largest rectangle that is left to the device to resize, in squares of [`LoaderConfig::image_size`] pixels a side.
pub const MOST_SQUARES: usize = 4;

/// A micro-batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Global step it belongs to.
    pub step: u64,
    /// Which of the step's micro-batches it is.
    pub micro: usize,
    /// Epoch of the step.
    pub epoch: u32,
    /// Sample of each image, after the replacement of bad ones.
    pub samples: Vec<i64>,
    /// What the crops show of the images, RGB bytes, each in a place of the same size; [`Geometry`] says where each starts and
    /// how large it is.
    pub images: HostBuffer,
    /// Crop of each image, or with [`Resample::OnDevice`] its rectangle to be resized.
    pub geometry: Vec<Geometry>,
    /// Images first found bad while this batch was made.
    pub bad: Vec<BadImage>,
}

/// Worker threads and the micro-batches they make.
#[derive(Debug)]
pub struct Loader {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Samples reported as bad.
    bad: HashSet<usize>,
    /// The first few of them, for the error.
    first_bad: Vec<BadImage>,
}

/// Order of the samples in an epoch: Fisher-Yates on `0..samples`, from the last place down.
///
/// # Panics
/// If `samples` does not fit 32 bits.
#[must_use]
pub fn order(seed: u64, epoch: u32, samples: usize) -> Vec<u32> {
    let stream = Stream::new(seed, epoch, 0, Purpose::Order);
    let count = u32::try_from(samples).expect("samples count below 2^32");
    let mut order: Vec<u32> = (0..count).collect();
    for (draw, place) in (1..samples).rev().enumerate() {
        order.swap(place, stream.below(draw as u32, place as u64 + 1) as usize);
    }
    order
}

/// Steps in an epoch: whole global batches, the rest is left out (and differs from epoch to epoch).
///
/// # Errors
/// [`Error::Data`] if there are fewer samples than the global batch has.
pub fn steps_per_epoch(source: &Source, global_batch: usize) -> Result<u64> {
    let steps = source.len() / global_batch.max(1);
    if steps == 0 {
        return Err(Error::data(
            source.path(),
            format!(
                "holds {} images, fewer than the {global_batch} of a step; \
                 lower optim.global_batch or add images",
                source.len()
            ),
        ));
    }
    Ok(steps as u64)
}

impl Loader {
    /// Starts threads that make the micro-batches from step `first_step` on.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a config that makes no sense, [`Error::Data`] for too few samples, [`Error::Io`] if
    /// threads cannot be had.
    pub fn new(source: Arc<Source>, config: LoaderConfig, first_step: u64) -> Result<Self> {
        Self::for_device(&Device::cpu(), source, config, first_step)
    }

    /// As [`new`](Self::new), with batches in memory that `dev` reads by itself, as [`Device::host_buffer`] gives it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn for_device(
        dev: &Device,
        source: Arc<Source>,
        config: LoaderConfig,
        first_step: u64,
    ) -> Result<Self> {
        let shared = Shared::new(dev.clone(), source, config, first_step)?;
        Self::start(shared, work)
    }

    fn start(shared: Shared, work: fn(&Shared)) -> Result<Self> {
        let threads = shared.config.threads;
        let shared = Arc::new(shared);
        let mut loader =
            Self { shared, workers: Vec::new(), bad: HashSet::new(), first_bad: Vec::new() };
        for i in 0..threads {
            let shared = Arc::clone(&loader.shared);
            let body = move || {
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| work(&shared))) {
                    shared.lock().panic = Some(panic_message(&*payload));
                    shared.made.notify_all();
                }
            };
            let worker = thread::Builder::new()
                .name(format!("data {i}"))
                .spawn(body)
                .map_err(Error::io("start", format!("data thread {i}")))?;
            loader.workers.push(worker);
        }
        Ok(loader)
    }

    /// Steps in an epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.shared.steps_per_epoch
    }

    /// The next micro-batch, or `None` if `stop` turns true before it is made.
    ///
    /// # Errors
    /// [`Error::Data`] if more images than allowed turned out to be bad, or a worker panicked.
    pub fn next(&mut self, stop: &AtomicBool) -> Result<Option<Batch>> {
        /// How often `stop` is looked at.
        const POLL: Duration = Duration::from_millis(20);
        let mut progress = self.shared.lock();
        let (mut batch, bad) = loop {
            if let Some(why) = &progress.panic {
                let why = format!("a data thread panicked, which is a defect of pixmim: {why}");
                return Err(Error::data(self.shared.source.path(), why));
            }
            if let Some(made) = progress.open.front_mut().and_then(|open| open.made.take()) {
                progress.open.pop_front();
                progress.front += 1;
                break made;
            }
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let waited = self.shared.made.wait_timeout(progress, POLL);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(progress);
        self.shared.room.notify_all();

        // Counted here, where batches come in order: which batch reports an image, and which one fails, does not
        // depend on the threads.
        for sample in bad {
            if self.bad.insert(sample) {
                let bad = self.shared.known().bad[&sample].clone();
                if self.first_bad.len() < 3 {
                    self.first_bad.push(bad.clone());
                }
                batch.bad.push(bad);
            }
        }
        if self.bad.len() > self.shared.max_bad {
            return Err(self.too_many_bad());
        }
        Ok(Some(batch))
    }

    /// Takes back a batch that is no longer needed, to fill its buffers anew, once a GPU has read them.
    pub fn recycle(&mut self, batch: Batch) {
        let mut progress = self.shared.lock();
        if progress.spare.len() < self.shared.config.prefetch {
            progress.spare.push_back(batch);
        }
    }

    fn too_many_bad(&self) -> Error {
        let Shared { source, config, .. } = &*self.shared;
        let named: Vec<String> =
            self.first_bad.iter().map(|bad| format!("{} ({})", bad.name, bad.reason)).collect();
        Error::data(
            source.path(),
            format!(
                "has {} unreadable images of {} ({:.2} %), data.max_bad_share allows {:.2} %: {}{}; \
                 repair or remove them, or raise data.max_bad_share",
                self.bad.len(),
                source.len(),
                100.0 * self.bad.len() as f64 / source.len() as f64,
                100.0 * config.max_bad_share,
                named.join(", "),
                if self.bad.len() > named.len() { ", .." } else { "" },
            ),
        )
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.room.notify_all();
        for worker in self.workers.drain(..) {
            // A panic of the worker was caught within it.
            let _ = worker.join();
        }
    }
}

impl LoaderConfig {
    /// Bytes of an image's place in a batch, and of all of them.
    fn sizes(&self) -> Result<(usize, usize)> {
        let squares = match (self.crop, self.resample) {
            (Crop::RandomResized, Resample::OnDevice) => MOST_SQUARES,
            _ => 1,
        };
        let size = self.image_size;
        let place = size.checked_mul(size).and_then(|pixels| pixels.checked_mul(3 * squares));
        let all = place.and_then(|place| Some((place, place.checked_mul(self.micro_batch)?)));
        all.filter(|(_, all)| isize::try_from(*all).is_ok()).ok_or_else(|| {
            let why = format!("is {}, which no memory holds at {size} pixels", self.micro_batch);
            Error::invalid("optim.micro_batch", why)
        })
    }

    fn check(&self) -> Result<()> {
        let positive = [
            ("model.image_size", self.image_size),
            ("optim.global_batch", self.global_batch),
            ("optim.micro_batch", self.micro_batch),
            ("data.threads", self.threads),
            ("data.prefetch", self.prefetch),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(Error::invalid(name, "is 0, must be at least 1"));
            }
        }
        if !self.global_batch.is_multiple_of(self.micro_batch) {
            return Err(Error::invalid(
                "optim.micro_batch",
                format!("is {}, which does not divide {}", self.micro_batch, self.global_batch),
            ));
        }
        let [low, high] = self.crop_scale;
        if !(0.0 < low && low <= high && high <= 1.0) {
            return Err(Error::invalid(
                "method.crop_scale",
                format!("is [{low}, {high}], must rise within 0 (excluded) to 1"),
            ));
        }
        for (name, value) in
            [("method.flip", self.flip), ("data.max_bad_share", self.max_bad_share)]
        {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::invalid(name, format!("is {value}, must be within 0 to 1")));
            }
        }
        match self.crop {
            Crop::Simple => augment::check_padding(self.padding, self.image_size),
            Crop::RandomResized => Ok(()),
        }
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loader_whose_workers(work: fn(&Shared)) -> Loader {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("data_batch_1.bin"), vec![0; 3073 * 4]).expect("written");
        let source = Source::open(folder.path(), &Default::default()).expect("a source");
        let config = LoaderConfig {
            image_size: 32,
            crop: Crop::Simple,
            padding: 4,
            crop_scale: [0.2, 1.0],
            interpolation: Interpolation::Bicubic,
            flip: 0.5,
            seed: 0,
            global_batch: 4,
            micro_batch: 2,
            threads: 2,
            prefetch: 2,
            cache_bytes: 0,
            max_bad_share: 0.01,
            resample: Resample::OnHost,
        };
        let shared = Shared::new(crate::Device::cpu(), Arc::new(source), config, 0);
        Loader::start(shared.expect("a config"), work).expect("threads")
    }

    #[test]
    fn a_panic_of_a_worker_is_an_error_of_next() {
        let mut loader = loader_whose_workers(|_| panic!("out of cheese"));
        let error = loader.next(&AtomicBool::new(false)).expect_err("the panic");
        assert!(error.to_string().contains("out of cheese"), "{error}");
    }

    #[test]
    fn waiting_ends_when_asked_to_stop() {
        let mut loader = loader_whose_workers(|_| ());
        assert_eq!(loader.next(&AtomicBool::new(true)).expect("no error"), None);
    }
}
