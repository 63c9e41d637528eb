//! Where the time of a training step goes: measured, and as a table, a picture and a trace.
//!
//! What is measured is one micro-batch and one update. A step of several micro-batches does the first several times, and
//! the table counts it so.

mod drawing;
mod table;
mod trace;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::files::write_atomic;
use super::step::{MicroBatch, Trainer};
use crate::ops::cost::{Cost, Peaks};
use crate::profile::{self, Profile, Span};
use crate::{Device, Error, Result, Tensor, TensorList};

/// Steps before anything is measured: caches fill, and a GPU's work is recorded in the second.
const WARM_UP: usize = 2;
/// Rounds of which medians are taken, and the time after which no new one is begun.
const ROUNDS: usize = 5;
const MOST: Duration = Duration::from_secs(60);

/// Names of the files that [`StepProfile::write`] leaves.
pub(super) const FOLDER: &str = "profile";
pub(super) const DRAWING: &str = "step.svg";

/// The profile of a training step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepProfile {
    /// One micro-batch and one update: the median of each time between two marks.
    pub profile: Profile,
    /// The same work as the trainer does it, without marks between ops; on a GPU as recorded work. Median.
    pub plain: Duration,
    /// The same work with marks, and launched op by op. Median of the whole, where `profile` is the sum of medians: less,
    /// if something else disturbed each round at another place.
    pub marked: Duration,
    /// Rounds measured.
    pub rounds: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Images of a micro-batch.
    pub images: usize,
    /// What the device reaches in the precision of the step, if known.
    pub peaks: Option<Peaks>,
    /// The device in words.
    pub device: String,
    /// Whether `plain` is that of recorded work.
    pub recorded: bool,
}

/// An op in one direction: all its calls in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// `attention`.
    pub op: &'static str,
    /// `forward`; empty for what has none, such as a copy.
    pub direction: &'static str,
    /// Calls of a step.
    pub calls: usize,
    /// Of all calls.
    pub took: Duration,
    /// Of all calls.
    pub cost: Cost,
}

impl StepProfile {
    /// Measures a step of `micro_batches` like `batch`, which leaves the trainer as it was: weights, moments and count of
    /// updates. `None` if `stop` turned true.
    ///
    /// # Errors
    /// Those of the step; [`Error::OutOfMemory`] for the copy of weights and moments on the host.
    pub fn take(
        trainer: &mut Trainer,
        batch: MicroBatch<'_>,
        micro_batches: usize,
        peaks: Option<Peaks>,
        stop: &AtomicBool,
    ) -> Result<Option<Self>> {
        let kept = Kept::take(trainer)?;
        let measured = measure(trainer, batch, micro_batches, stop);
        kept.restore(trainer)?;
        let Some(Measured { profile, plain, marked, rounds }) = measured? else { return Ok(None) };
        let (device, recorded) = match trainer.device() {
            Device::Cpu(_) => ("cpu".into(), false),
            Device::Cuda(gpu) => (gpu.properties().name.clone(), trainer.records()),
        };
        let images = batch.samples.len();
        Ok(Some(Self {
            profile,
            plain,
            marked,
            rounds,
            micro_batches,
            images,
            peaks,
            device,
            recorded,
        }))
    }

    /// Ops by direction, the longest first.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        for (span, cost, times) in self.ops() {
            let (op, direction) = span.name.split_once("::").unwrap_or((span.name, ""));
            let known = rows.iter().position(|row| (row.op, row.direction) == (op, direction));
            let at = known.unwrap_or_else(|| {
                let (took, cost) = (Duration::ZERO, Cost::default());
                rows.push(Row { op, direction, calls: 0, took, cost });
                rows.len() - 1
            });
            let row = &mut rows[at];
            row.calls += times;
            row.took += span.took() * times as u32;
            row.cost = row.cost + cost * times;
        }
        rows.sort_by_key(|row| std::cmp::Reverse(row.took));
        rows
    }

    /// Time of a step, with marks between ops.
    #[must_use]
    pub fn took(&self) -> Duration {
        let repeated = |span: &Span| span.depth == 0 && is_of_micro_batch(span.name);
        let of_micro_batch: Duration =
            self.profile.spans().filter(repeated).map(|span| span.took()).sum();
        self.profile.took() + of_micro_batch * (self.micro_batches - 1) as u32
    }

    /// Time of a step in which no op ran.
    #[must_use]
    pub fn idle(&self) -> Duration {
        self.took().saturating_sub(self.rows().iter().map(|row| row.took).sum())
    }

    /// The spans of ops, with their work and how often a step does them.
    fn ops(&self) -> impl Iterator<Item = (Span, Cost, usize)> {
        let times = self.profile.spans().scan(1, |times, span| {
            if span.depth == 0 {
                *times = if is_of_micro_batch(span.name) { self.micro_batches } else { 1 };
            }
            Some((span, *times))
        });
        times.filter_map(|(span, times)| Some((span, span.cost?, times)))
    }

    /// Writes `step.csv`, `step.svg` and `trace.json` into the folder, which is made if it is not there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        write_atomic(&folder.join("step.csv"), self.csv().as_bytes())?;
        write_atomic(&folder.join(DRAWING), self.svg().as_bytes())?;
        write_atomic(&folder.join("trace.json"), self.trace().as_bytes())
    }
}

/// Whether a step of several micro-batches does this outermost stage several times.
fn is_of_micro_batch(stage: &str) -> bool {
    ["forward", "backward"].contains(&stage)
}

/// Medians of some rounds: see [`StepProfile`].
struct Measured {
    profile: Profile,
    plain: Duration,
    marked: Duration,
    rounds: usize,
}

/// `None` if `stop` turned true.
fn measure(
    trainer: &mut Trainer,
    batch: MicroBatch<'_>,
    micro_batches: usize,
    stop: &AtomicBool,
) -> Result<Option<Measured>> {
    let dev = trainer.device().clone();
    let mut step = || {
        trainer.clear()?;
        trainer.accumulate(batch, micro_batches)?;
        // Small enough that many updates by one micro-batch stay finite.
        trainer.update(1e-6).map(drop)
    };
    for _ in 0..WARM_UP {
        step()?;
    }
    let (mut plain, mut profiles) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    while profiles.is_empty() || (profiles.len() < ROUNDS && begin.elapsed() < MOST) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        // In turn, so that a change of the machine's speed meets both.
        plain.push(dev.time(&mut step)?);
        profiles.push(profile::collect(&dev, &mut step)?.1);
    }
    let mut marked: Vec<_> = profiles.iter().map(Profile::took).collect();
    Ok(Some(Measured {
        profile: Profile::median(&profiles)?,
        plain: profile::median(&mut plain),
        marked: profile::median(&mut marked),
        rounds: profiles.len(),
    }))
}

/// What steps change of a trainer, on the host.
struct Kept {
    /// Weights and both moments.
    lists: [Tensor; 3],
    updates: u64,
}

impl Kept {
    fn take(trainer: &Trainer) -> Result<Self> {
        let host = Device::cpu();
        let copy = |list: &TensorList| {
            let mut copy = Tensor::new(&host, list.flat().dtype(), list.flat().shape())?;
            trainer.device().copy(copy.view_mut(), list.flat())?;
            Ok(copy)
        };
        let lists =
            [copy(&trainer.mae.weights)?, copy(&trainer.exp_avg)?, copy(&trainer.exp_avg_sq)?];
        Ok(Self { lists, updates: trainer.updates()? })
    }

    fn restore(self, trainer: &mut Trainer) -> Result<()> {
        let dev = trainer.device().clone();
        let lists = [&mut trainer.mae.weights, &mut trainer.exp_avg, &mut trainer.exp_avg_sq];
        for (list, kept) in lists.into_iter().zip(&self.lists) {
            dev.copy(list.flat_mut(), kept.view())?;
        }
        trainer.mae.round(&dev)?;
        trainer.set_updates(self.updates)?;
        trainer.clear()
    }
}
