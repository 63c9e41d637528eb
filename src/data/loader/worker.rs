//! What the threads of the loader do: claim slots of micro-batches in order, and fill them.
//!
//! A slot's place in the batch is its own piece of the batch's memory, so threads fill slots side by side.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::vec;

use super::{Batch, LoaderConfig, MOST_SQUARES, Resample, order, steps_per_epoch};
use crate::data::Image;
use crate::data::augment::{self, Geometry};
use crate::data::resize::{Rect, resize, short_side};
use crate::data::source::{BadImage, Source};
use crate::train::config::Crop;
use crate::{Device, Error, HostBuffer, Result};

/// What the loader and its workers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) source: Arc<Source>,
    pub(super) config: LoaderConfig,
    /// Who reads the batches.
    dev: Device,
    /// Bytes of an image's place in a batch.
    place_bytes: usize,
    /// Bytes of a batch's images.
    batch_bytes: usize,
    pub(super) steps_per_epoch: u64,
    /// Micro-batches in a step.
    micros: u64,
    /// Distinct bad images that are tolerated.
    pub(super) max_bad: usize,
    /// Bytes of images that are kept.
    cache_bytes: usize,
    progress: Mutex<Progress>,
    /// A micro-batch was made, or a worker panicked.
    pub(super) made: Condvar,
    /// A micro-batch was taken, or the loader is closed.
    pub(super) room: Condvar,
    known: Mutex<Known>,
}

/// Which micro-batches are under way. Counted from the start of the run: micro-batch `i` is part of step
/// `i / micros`.
#[derive(Debug)]
pub(super) struct Progress {
    /// The next micro-batch to be taken.
    pub(super) front: u64,
    /// Micro-batches under way, from `front` on.
    pub(super) open: VecDeque<Open>,
    /// Batches to be filled anew. The first has waited longest, so that a GPU has read it most likely.
    pub(super) spare: VecDeque<Batch>,
    /// The latest epoch that was begun, and its order.
    order: Option<(u32, Arc<[u32]>)>,
    pub(super) closed: bool,
    /// A worker's last words.
    pub(super) panic: Option<String>,
}

/// A micro-batch under way.
#[derive(Debug)]
pub(super) struct Open {
    /// The batch, without its images.
    batch: Batch,
    /// Places of images that no worker has taken yet.
    places: vec::IntoIter<HostBuffer>,
    /// Slots that workers have filled.
    filled: usize,
    slots: Vec<Option<Slot>>,
    /// The batch, and the bad samples met on the way to it, in order and with repetitions.
    pub(super) made: Option<(Batch, Vec<usize>)>,
}

/// One image of a micro-batch.
#[derive(Debug)]
struct Slot {
    /// Its place in the batch.
    place: HostBuffer,
    /// Sample and crop; `None` if all that was tried was bad.
    image: Option<(usize, Geometry)>,
    /// Samples tried before, all bad.
    bad: Vec<usize>,
}

/// What is known of samples.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) bad: HashMap<usize, BadImage>,
    resized: HashMap<usize, Image>,
    resized_bytes: usize,
}

/// One slot to be filled.
struct Job {
    /// Micro-batch, counted from the start of the run.
    micro_batch: u64,
    slot: usize,
    epoch: u32,
    /// Place in the epoch.
    position: usize,
    order: Arc<[u32]>,
}

/// A worker: fills slots until the loader is closed.
pub(super) fn work(shared: &Shared) {
    while let Some((job, place)) = shared.next_job() {
        let slot = shared.fill(&job, place);
        shared.put(&job, slot);
    }
}

impl Shared {
    pub(super) fn new(
        dev: Device,
        source: Arc<Source>,
        config: LoaderConfig,
        first_step: u64,
    ) -> Result<Self> {
        config.check()?;
        let (place_bytes, batch_bytes) = config.sizes()?;
        let steps_per_epoch = steps_per_epoch(&source, config.global_batch)?;
        if first_step / steps_per_epoch >= 1 << 28 || source.len() >= 1 << 32 {
            return Err(Error::invalid(
                "first_step",
                format!("is {first_step}; epochs count below 2^28 and samples below 2^32"),
            ));
        }
        let micros = (config.global_batch / config.micro_batch) as u64;
        Ok(Self {
            max_bad: max_bad(source.len(), config.max_bad_share),
            cache_bytes: match config.crop {
                Crop::Simple if !source.in_memory() => config.cache_bytes,
                _ => 0,
            },
            progress: Mutex::new(Progress {
                front: first_step * micros,
                open: VecDeque::new(),
                spare: VecDeque::new(),
                order: None,
                closed: false,
                panic: None,
            }),
            made: Condvar::new(),
            room: Condvar::new(),
            known: Mutex::default(),
            dev,
            place_bytes,
            batch_bytes,
            steps_per_epoch,
            micros,
            source,
            config,
        })
    }

    /// A poisoned lock is taken: a worker that panicked is reported by [`Loader::next`].
    pub(super) fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a slot to fill, and takes its place in the batch; `None` once the loader is closed.
    fn next_job(&self) -> Option<(Job, HostBuffer)> {
        let size = self.config.micro_batch;
        let mut progress = self.lock();
        let (slot, place) = loop {
            if progress.closed {
                return None;
            }
            if let Some(open) = progress.open.back_mut()
                && let Some(place) = open.places.next()
            {
                break (size - 1 - open.places.len(), place);
            }
            if progress.open.len() < self.config.prefetch {
                let spare = progress.spare.pop_front().unwrap_or_default();
                progress.open.push_back(self.open(spare));
            } else {
                progress = self.room.wait(progress).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let micro_batch = progress.front + progress.open.len() as u64 - 1;

        let (step, micro) = (micro_batch / self.micros, micro_batch % self.micros);
        let epoch = (step / self.steps_per_epoch) as u32;
        let in_epoch = (step % self.steps_per_epoch * self.micros + micro) as usize;
        let order = match &progress.order {
            Some((of, order)) if *of == epoch => Arc::clone(order),
            _ => {
                let order: Arc<[u32]> = order(self.config.seed, epoch, self.source.len()).into();
                progress.order = Some((epoch, Arc::clone(&order)));
                order
            }
        };
        let position = in_epoch * size + slot;
        Some((Job { micro_batch, slot, epoch, position, order }, place))
    }

    /// A micro-batch of which nothing is made yet, in the memory of one that is no longer needed.
    fn open(&self, mut batch: Batch) -> Open {
        let mut images = std::mem::take(&mut batch.images);
        if images.len() != self.batch_bytes {
            images = self.dev.host_buffer(self.batch_bytes);
        }
        Open {
            batch,
            places: images.into_pieces(self.place_bytes).into_iter(),
            filled: 0,
            slots: (0..self.config.micro_batch).map(|_| None).collect(),
            made: None,
        }
    }

    /// Makes the image of a slot; where it is bad, that of the next sample in the epoch's order.
    fn fill(&self, job: &Job, mut place: HostBuffer) -> Slot {
        let mut bad = Vec::new();
        // With more bad samples than are tolerated the micro-batch fails: no need to look at all the others.
        while bad.len() <= self.max_bad {
            let sample = job.order[(job.position + bad.len()) % job.order.len()] as usize;
            match self.make(sample, job.epoch, &mut place) {
                Ok(geometry) => return Slot { place, image: Some((sample, geometry)), bad },
                Err(KnownBad) => bad.push(sample),
            }
            // Nobody waits for the rest of what may be a long row of bad ones.
            if self.lock().closed {
                break;
            }
        }
        Slot { place, image: None, bad }
    }

    /// Reads a sample, and copies to `place` what its crop shows.
    fn make(
        &self,
        sample: usize,
        epoch: u32,
        place: &mut HostBuffer,
    ) -> Result<Geometry, KnownBad> {
        let LoaderConfig {
            image_size: size,
            padding,
            crop_scale,
            interpolation,
            flip,
            resample,
            ..
        } = self.config;
        let choices = augment::choices(self.config.seed, epoch, sample);
        match self.config.crop {
            Crop::Simple => {
                let image = self.resized(sample)?;
                let extent = (image.height, image.width);
                let crop = augment::simple_crop(&choices, extent, size, padding, flip)
                    .expect("the padding was checked, the short side is that of the crop");
                let (part, geometry) = augment::shown(&crop, size);
                copy(&image, part, place);
                Ok(geometry)
            }
            Crop::RandomResized => {
                let image = self.read(sample)?;
                let extent = (image.height, image.width);
                let (rect, mirrored) =
                    augment::random_resized_crop(&choices, extent, crop_scale, flip);
                let ships = resample == Resample::OnDevice
                    && rect.height * rect.width <= MOST_SQUARES * size * size;
                let part = if ships {
                    copy(&image, rect, place);
                    rect
                } else {
                    let square = resize(&image, rect, (size, size), interpolation);
                    copy(&square, Rect::whole(&square), place);
                    Rect::whole(&square)
                };
                let (height, width) = (part.height as i64, part.width as i64);
                Ok(Geometry { height, width, flip: mirrored.into(), ..Geometry::default() })
            }
        }
    }

    /// A sample with its short side resized to that of the crop.
    fn resized(&self, sample: usize) -> Result<Image, KnownBad> {
        if let Some(image) = self.known().resized.get(&sample) {
            return Ok(image.clone());
        }
        let mut image = self.read(sample)?;
        let target = short_side(image.height, image.width, self.config.image_size);
        if target != (image.height, image.width) {
            image = resize(&image, Rect::whole(&image), target, self.config.interpolation);
        }
        let mut known = self.known();
        let bytes = known.resized_bytes + image.pixels.len();
        if bytes <= self.cache_bytes
            && let Entry::Vacant(entry) = known.resized.entry(sample)
        {
            entry.insert(image.clone());
            known.resized_bytes = bytes;
        }
        Ok(image)
    }

    /// Reads a sample, unless it is known to be bad; remembers if it is.
    fn read(&self, sample: usize) -> Result<Image, KnownBad> {
        if self.known().bad.contains_key(&sample) {
            return Err(KnownBad);
        }
        self.source.read(sample).map_err(|bad| {
            self.known().bad.insert(sample, bad);
            KnownBad
        })
    }

    /// Notes a filled slot. The last one of a micro-batch completes it.
    fn put(&self, job: &Job, slot: Slot) {
        let mut progress = self.lock();
        let at = (job.micro_batch - progress.front) as usize;
        let open = &mut progress.open[at];
        open.slots[job.slot] = Some(slot);
        open.filled += 1;
        if open.filled < open.slots.len() {
            return;
        }
        let (slots, batch) = (std::mem::take(&mut open.slots), std::mem::take(&mut open.batch));
        open.made = Some(self.assemble(job, slots, batch));
        drop(progress);
        self.made.notify_all();
    }

    /// Puts a micro-batch together of its slots.
    fn assemble(
        &self,
        job: &Job,
        slots: Vec<Option<Slot>>,
        mut batch: Batch,
    ) -> (Batch, Vec<usize>) {
        batch.step = job.micro_batch / self.micros;
        batch.micro = (job.micro_batch % self.micros) as usize;
        batch.epoch = job.epoch;
        batch.samples.clear();
        batch.geometry.clear();
        batch.bad.clear();
        let mut bad = Vec::new();
        let mut places = Vec::with_capacity(slots.len());
        for (i, slot) in slots.into_iter().flatten().enumerate() {
            places.push(slot.place);
            bad.extend(slot.bad);
            if let Some((sample, geometry)) = slot.image {
                let offset = (i * self.place_bytes) as i64;
                batch.samples.push(sample as i64);
                batch.geometry.push(Geometry { offset, ..geometry });
            }
        }
        batch.images = HostBuffer::join(places).expect("all places of one batch, in order");
        (batch, bad)
    }
}

/// Copies a part of an image to its place. Zeros follow: a batch shows nothing of the one before it.
fn copy(image: &Image, part: Rect, place: &mut HostBuffer) {
    let (pixels, rest) = place.split_at_mut(3 * part.height * part.width);
    let rows = image.pixels.chunks_exact(3 * image.width).skip(part.top);
    for (to, row) in pixels.chunks_exact_mut(3 * part.width).zip(rows) {
        to.copy_from_slice(&row[3 * part.left..][..to.len()]);
    }
    rest.fill(0);
}

/// The sample is bad; [`Known`] holds why.
struct KnownBad;

/// Bad images that are tolerated of so many: one is, whatever the share; but one sample must be left.
#[must_use]
pub fn max_bad(samples: usize, share: f64) -> usize {
    ((share * samples as f64) as usize).max(1).min(samples - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_image_is_always_tolerated_and_one_sample_must_be_left() {
        assert_eq!(max_bad(64, 0.01), 1);
        assert_eq!(max_bad(1000, 0.01), 10);
        assert_eq!(max_bad(1000, 0.0), 1);
        assert_eq!(max_bad(3, 1.0), 2);
        assert_eq!(max_bad(1, 1.0), 0);
    }
}
