//! The loop: data, steps, logs, pictures, checkpoints, signals.

mod device;
mod event;
mod folder;
mod gallery;
mod pace;
mod records;
mod resume;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::checkpoint::State;
use super::config::{Config, Crop, Resolved, Target};
use super::metrics::{Notice, NoticeKind};
use super::schedule::Schedule;
use super::state::Snapshot;
use super::step::{Outcome, Settings, Trainer};
use super::timing::StepProfile;
use super::{StepRecord, checkpoint, cost, peaks};
use crate::data::loader::{Loader, LoaderConfig, Resample};
use crate::data::shard::Set;
use crate::data::source::Source;
use crate::data::{decode, loader};
use crate::ops::cost::Peaks;
use crate::{Device, Error, Result};

pub use event::{Event, Options, Peak, Plan, Resume, Summary};
use gallery::Gallery;
use pace::Pace;
use records::Records;

/// Steps of a dry run, the first one not timed.
const DRY_STEPS: u64 = 20;
/// Weight of a new loss in the smoothed one, once enough are in.
const SMOOTHING: f64 = 0.05;

/// Trains as `config` says. `stop` is polled between micro-batches, while waiting for data and around pictures: when it
/// turns true the run saves the last finished step and returns. Everything worth showing is told to `tell`; nothing is
/// printed.
///
/// # Errors
/// See [`Error`]; each has the exit code of a program that ends with it.
pub fn run(
    config: &Config,
    options: &Options,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Summary> {
    config.check()?;
    let resolved = config.resolved();
    let (device, dtype, why) = device::choose(config, &resolved)?;
    let source = Arc::new(Source::open(&config.data.path, &decode::Options::from(&config.data))?);
    let steps_per_epoch = loader::steps_per_epoch(&source, config.optim.global_batch)?;
    let dir = (!options.dry_run).then(|| config.log.out.clone());
    let stale = if dir.is_some() { folder::judge(config, options)? } else { Vec::new() };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(resolved.compute_threads)
        .build()
        .map_err(|error| Error::invalid("runtime.threads", format!("cannot start: {error}")))?;
    let (mut step, mut batches) = (settings(config, &resolved), loader_config(config, &resolved));
    if matches!(device, Device::Cuda(_)) && config.method.crop == Crop::RandomResized {
        // Anew for each image in each epoch: too much for most hosts, nothing to a GPU.
        step.resize = Some(config.method.interpolation);
        batches.resample = Resample::OnDevice;
    }
    // Before the trainer takes the memory.
    let peak = pool.install(|| Peak::measure(&device, dtype))?;
    let roofs = match &peak {
        Some(peak) if options.profile => Some(Peaks {
            bytes_per_second: pool.install(|| peaks::copy(&device))?.bytes_per_second(),
            flops_per_second: peak.flops_per_s,
        }),
        _ => None,
    };
    let mut trainer = pool.install(|| Trainer::new(device, config.model, dtype, step))?;

    let mut state = State {
        step: 0,
        samples: 0,
        seed: config.runtime.seed,
        skipped: 0,
        skipped_in_row: 0,
        steps_per_epoch,
        smoothed_loss: f64::NAN,
        config_hash: resume::config_hash(config, &resolved),
        world_size: 1,
    };
    let mut warnings = Vec::new();
    warnings.extend(source.packed().and_then(|set| packed_otherwise(config, set)));
    let resumed_from = match &dir {
        Some(dir) => resume::load(&options.resume, dir, &mut trainer, &mut state, &mut warnings)?,
        None => None,
    };
    // Only now that everything that can be refused has been judged is the disk touched.
    if dir.is_some() {
        folder::claim(config, &stale)?;
    }
    let planned = config.total_steps(steps_per_epoch);
    let schedule = Schedule {
        peak: config.peak_lr(),
        min: config.schedule.min_lr,
        warmup: config.warmup_steps(steps_per_epoch),
        total: planned,
    };
    let micro_batches = config.optim.global_batch / config.optim.micro_batch;
    let plan = Plan {
        device: why,
        batch: batch_arithmetic(config, micro_batches),
        lr: schedule.peak,
        images: source.len() as u64,
        source: source.path().display().to_string(),
        parameters: trainer.mae.table().parameters(),
        memory_bytes: trainer.memory_bytes(),
        step_cost: cost::step(&trainer, micro_batches),
        peak,
        steps: planned,
        steps_per_epoch,
        resumed_from,
        folder: dir.clone(),
    };
    tell(Event::Start(&plan));
    let records = dir.map(|dir| Records::open(dir, config, options, &plan)).transpose()?;
    let last = if options.dry_run { DRY_STEPS.min(planned) } else { planned };
    let loader = |trainer: &Trainer| {
        Loader::for_device(trainer.device(), source.clone(), batches.clone(), state.step)
    };
    // Before the loader's threads, which would take from it.
    if options.profile && state.step < last {
        let loader = loader(&trainer)?;
        if let Some(profile) =
            pool.install(|| profile(&mut trainer, loader, micro_batches, roofs, stop))?
        {
            let folder = records.as_ref().map(|records| records.profile(&profile)).transpose()?;
            tell(Event::Profile(&profile, folder.as_deref()));
        }
    }
    let mut run = Run {
        config,
        stop,
        tell,
        loader: loader(&trainer)?,
        gallery: Gallery::new(config, &resolved, &source, &trainer)?,
        pool,
        trainer,
        state,
        schedule,
        last,
        micro_batches,
        records,
        saved_step: resumed_from,
        pace: Pace::default(),
        step_flops: plan.peak.map_or(f64::NAN, |_| plan.step_cost.flops as f64),
        peak_flops_per_s: plan.peak.map_or(f64::NAN, |peak| peak.flops_per_s),
    };
    for warning in warnings {
        run.notice(NoticeKind::Warning, &warning)?;
    }
    if let Some(step) = resumed_from {
        run.notice(NoticeKind::Resumed, &format!("went on after step {step}"))?;
    }
    let finished = run.train();
    run.end(finished)
}

/// The step that a config describes.
#[must_use]
pub fn settings(config: &Config, resolved: &Resolved) -> Settings {
    Settings {
        micro_batch: config.optim.micro_batch,
        radius: (config.method.target == Target::LowFreq).then_some(resolved.radius),
        norm_pix: config.method.norm_pix,
        kept: config.kept_patches(),
        mask_block: config.method.mask_block,
        resize: None,
        mean: config.data.mean,
        std: config.data.std,
        betas: config.optim.betas,
        eps: config.optim.eps,
        weight_decay: config.optim.weight_decay,
        decay_tokens: config.optim.decay_tokens,
        clip: config.optim.clip_grad,
        seed: config.runtime.seed,
        record: true,
    }
}

/// What a simple crop of packed images loses against one of the photos, if it does.
fn packed_otherwise(config: &Config, set: &Set) -> Option<String> {
    let (side, wanted) = (set.side as usize, config.model.image_size);
    let resized_alike = side == wanted && set.interpolation == config.method.interpolation;
    // Images that were packed as they are, are resized once. A random crop is resampled in any case.
    if side == 0 || resized_alike || config.method.crop != Crop::Simple {
        return None;
    }
    let words =
        |side: usize, interpolation| format!("{side} pixels, {interpolation:?}").to_lowercase();
    Some(format!(
        "the shards were resized to {}, and are resized again to {}; pack the photos for that, or train as they were \
         packed",
        words(side, set.interpolation),
        words(wanted, config.method.interpolation)
    ))
}

/// Profiles the step of a loader's first micro-batch. `None` if `stop` turned true.
fn profile(
    trainer: &mut Trainer,
    mut loader: Loader,
    micro_batches: usize,
    roofs: Option<Peaks>,
    stop: &AtomicBool,
) -> Result<Option<StepProfile>> {
    let Some(batch) = loader.next(stop)? else { return Ok(None) };
    drop(loader);
    StepProfile::take(trainer, &batch, micro_batches, roofs, stop)
}

/// The batches that a config describes.
#[must_use]
pub fn loader_config(config: &Config, resolved: &Resolved) -> LoaderConfig {
    LoaderConfig {
        image_size: config.model.image_size,
        crop: config.method.crop,
        padding: resolved.padding,
        crop_scale: config.method.crop_scale,
        interpolation: config.method.interpolation,
        flip: config.method.flip,
        seed: config.runtime.seed,
        global_batch: config.optim.global_batch,
        micro_batch: config.optim.micro_batch,
        threads: resolved.data_threads,
        prefetch: config.data.prefetch,
        cache_bytes: config.data.cache_mib << 20,
        max_bad_share: config.data.max_bad_share,
        resample: Resample::OnHost,
    }
}

fn batch_arithmetic(config: &Config, micro_batches: usize) -> String {
    let (global, micro) = (config.optim.global_batch, config.optim.micro_batch);
    let lr = match config.optim.base_lr {
        Some(base) => format!("lr {:.3e} = {base:e} x {global} / 256", config.peak_lr()),
        None => format!("lr {:.3e} as given", config.peak_lr()),
    };
    format!("global {global} = {micro_batches} x {micro} micro; {lr}")
}

/// A run on its way.
struct Run<'a> {
    config: &'a Config,
    stop: &'a AtomicBool,
    tell: &'a mut dyn FnMut(Event<'_>),
    loader: Loader,
    gallery: Gallery,
    pool: rayon::ThreadPool,
    trainer: Trainer,
    state: State,
    schedule: Schedule,
    /// Step after which this call ends.
    last: u64,
    micro_batches: usize,
    /// None in a dry run.
    records: Option<Records>,
    /// Step of the newest checkpoint.
    saved_step: Option<u64>,
    pace: Pace,
    /// Operations of a step's products, and those that a second can have. Not numbers where times mean nothing.
    step_flops: f64,
    peak_flops_per_s: f64,
}

/// How training ended, short of an error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    Finished,
    Interrupted,
}

impl Run<'_> {
    fn train(&mut self) -> Result<Ended> {
        // A run that goes on draws again: a signal may have come before the picture of its step.
        if self.state.step == 0 || self.is_due(self.config.log.picture_every) {
            self.picture()?;
        }
        while self.state.step < self.last {
            let start = Instant::now();
            let mut wait = Duration::ZERO;
            let Some((outcome, lr)) = self.step(&mut wait)? else {
                return Ok(Ended::Interrupted);
            };
            self.account(outcome, lr, start.elapsed(), wait)?;
            self.check_divergence()?;
            if self.is_due(self.config.log.picture_every) {
                self.picture()?;
            }
            if self.is_due(self.config.log.checkpoint_every) {
                self.save()?;
                self.report("running")?;
            }
        }
        self.picture()?;
        Ok(Ended::Finished)
    }

    /// Whether something that is done every so many steps is due now; the end has its own turn.
    fn is_due(&self, every: u64) -> bool {
        let step = self.state.step;
        every > 0 && step.is_multiple_of(every) && step < self.last
    }

    /// One step: all its micro-batches, then the update. None if a signal came first.
    fn step(&mut self, wait: &mut Duration) -> Result<Option<(Outcome, f64)>> {
        let lr = self.schedule.lr(self.state.step);
        self.trainer.clear()?;
        let mut samples = Vec::new();
        for _ in 0..self.micro_batches {
            let start = Instant::now();
            let Some(batch) = self.loader.next(self.stop)? else { return Ok(None) };
            *wait += start.elapsed();
            for bad in &batch.bad {
                let line = format!("{} is left out: {}", bad.name, bad.reason);
                (self.tell)(Event::Warning(&line));
                if let Some(records) = &mut self.records {
                    records.bad_image(self.state.step, bad)?;
                }
            }
            samples.extend_from_slice(&batch.samples);
            self.pool.install(|| self.trainer.accumulate_batch(&batch, self.micro_batches))?;
            self.loader.recycle(batch);
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
        }
        let outcome = self.pool.install(|| self.trainer.update(lr))?;
        self.state.step += 1;
        self.state.samples += self.config.optim.global_batch as u64;
        if outcome.updated {
            self.state.skipped_in_row = 0;
        } else {
            self.skipped(outcome, &samples)?;
        }
        Ok(Some((outcome, lr)))
    }

    /// Records a step that was not taken.
    fn skipped(&mut self, outcome: Outcome, samples: &[i64]) -> Result<()> {
        self.state.skipped += 1;
        self.state.skipped_in_row += 1;
        let step = self.state.step;
        let mut line = format!(
            "step {step} was skipped: loss {}, gradient norm {}",
            outcome.loss, outcome.grad_norm
        );
        if let Some(records) = &self.records {
            let dump = resume::dump(records.dir(), &self.state, outcome, samples, &self.trainer)?;
            line.push_str(&format!("; see {}", dump.display()));
        }
        self.notice(NoticeKind::Skipped, &line)
    }

    /// Ends the run if too many steps in a row could not be taken.
    fn check_divergence(&self) -> Result<()> {
        let State { step, skipped_in_row, .. } = self.state;
        if skipped_in_row < self.config.optim.max_skipped {
            return Ok(());
        }
        let why = format!(
            "{skipped_in_row} steps in a row had a loss or gradient out of range; lower the learning rate, lengthen \
             schedule.warmup, set optim.clip_grad to 1, or use runtime.precision f32, and go on from the last \
             checkpoint"
        );
        Err(Error::Diverged { step, why })
    }

    /// Logs a step.
    fn account(&mut self, outcome: Outcome, lr: f64, time: Duration, wait: Duration) -> Result<()> {
        let Self { state, pace, config, .. } = self;
        if outcome.updated {
            // The mean of the first losses, then a moving average.
            let share = SMOOTHING.max(1.0 / (state.step - state.skipped) as f64);
            let before =
                if state.smoothed_loss.is_nan() { outcome.loss } else { state.smoothed_loss };
            state.smoothed_loss = before + share * (outcome.loss - before);
        }
        pace.add(time, wait);
        let flops_per_s = pace.lap().flops_per_s(self.step_flops);
        let record = StepRecord {
            step: state.step,
            epoch: state.step as f64 / state.steps_per_epoch as f64,
            loss: if outcome.updated { outcome.loss } else { f64::NAN },
            lr,
            grad_norm: outcome.grad_norm,
            images_per_s: pace.lap().images_per_s(config.optim.global_batch),
            data_wait: pace.lap().data_wait(),
            tflop_per_s: flops_per_s / 1e12,
            mfu: flops_per_s / self.peak_flops_per_s,
        };
        let logged = state.step.is_multiple_of(config.log.every) || state.step == self.last;
        if logged {
            pace.next_lap();
            if let Some(records) = &mut self.records {
                records.step(&record)?;
            }
        }
        let eta = pace.whole().time_of(self.last - state.step);
        let smoothed_loss = state.smoothed_loss;
        (self.tell)(Event::Step { record: &record, smoothed_loss, eta, logged });
        if let Some(share) = self.pace.slow_data() {
            let line = format!(
                "{:.0} % of the time goes into waiting for data; raise data.threads or data.cache_mib, or store \
                 smaller images",
                100.0 * share
            );
            self.notice(NoticeKind::Warning, &line)?;
        }
        Ok(())
    }

    /// Tells the user something, and keeps it for the report.
    fn notice(&mut self, kind: NoticeKind, text: &str) -> Result<()> {
        if matches!(kind, NoticeKind::Warning | NoticeKind::Skipped) {
            (self.tell)(Event::Warning(text));
        }
        match &mut self.records {
            Some(records) => {
                records.notice(&Notice { step: self.state.step, kind, text: text.into() })
            }
            None => Ok(()),
        }
    }

    fn picture(&mut self) -> Result<()> {
        let Some(records) = &mut self.records else { return Ok(()) };
        if self.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (gallery, trainer, step) = (&mut self.gallery, &self.trainer, self.state.step);
        let Some(picture) = self.pool.install(|| gallery.draw(trainer, step))? else {
            return Ok(());
        };
        let path = records.picture(&picture, step)?;
        (self.tell)(Event::Picture(&path));
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        let Some(records) = &mut self.records else { return Ok(()) };
        if self.saved_step == Some(self.state.step) {
            return Ok(());
        }
        records.sync()?;
        let snapshot = Snapshot::take(&self.trainer)?;
        let contents = snapshot.contents(&self.trainer, self.config, &self.state);
        let path = checkpoint::save(records.dir(), &contents, self.config.log.keep_last)?;
        self.saved_step = Some(self.state.step);
        (self.tell)(Event::Checkpoint(&path));
        Ok(())
    }

    fn report(&mut self, status: &str) -> Result<Option<PathBuf>> {
        let whole = self.pace.whole();
        let speed = whole.images_per_s(self.config.optim.global_batch);
        let mfu = whole.flops_per_s(self.step_flops) / self.peak_flops_per_s;
        let Some(records) = &self.records else { return Ok(None) };
        records.report(status, &self.state, self.schedule.total, [speed, mfu]).map(Some)
    }

    /// Saves what there is, writes the report, and says how it went.
    fn end(mut self, ended: Result<Ended>) -> Result<Summary> {
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => {
                // The last finished step is sound, and worth keeping: unless steps could not be taken, the disk would not
                // have them, or a GPU failed, perhaps within an update. The first error is the one to tell.
                let keeps = !matches!(
                    error,
                    Error::Io { .. }
                        | Error::Diverged { .. }
                        | Error::Gpu { .. }
                        | Error::Kernel { .. }
                );
                if keeps {
                    let _ = self.save();
                }
                let _ = self.report(&format!("stopped: {error}"));
                return Err(error);
            }
        };
        let interrupted = ended == Ended::Interrupted;
        if interrupted {
            self.notice(NoticeKind::Interrupted, "a signal ended the run here")?;
        }
        self.save()?;
        let status = if interrupted { "interrupted; --resume auto goes on" } else { "finished" };
        let report = self.report(status)?;
        let whole = self.pace.whole();
        let flops_per_s = whole.flops_per_s(self.step_flops);
        Ok(Summary {
            steps: self.state.step,
            loss: self.state.smoothed_loss,
            images_per_s: whole.images_per_s(self.config.optim.global_batch),
            data_wait: whole.data_wait(),
            tflop_per_s: flops_per_s / 1e12,
            mfu: flops_per_s / self.peak_flops_per_s,
            report,
            interrupted,
        })
    }
}
