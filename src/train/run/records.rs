//! What a run writes while it works, beside checkpoints.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::{Options, Plan};
use crate::data::source;
use crate::train::checkpoint::State;
use crate::train::config::Config;
use crate::train::metrics::{self, BadImage, BadImages, Metrics, Notice, Notices};
use crate::train::pictures::Picture;
use crate::train::report::{self, Report};
use crate::train::tensorboard::EventFile;
use crate::train::timing::{self, StepProfile};
use crate::train::{StepRecord, timeline};
use crate::{Error, Result};

/// Images in the strip of pictures over time.
const TIMELINE_IMAGES: usize = 3;

/// The open journals of a run, and what its report says of it.
pub(super) struct Records {
    dir: PathBuf,
    metrics: Metrics,
    bad_images: BadImages,
    notices: Notices,
    events: EventFile,
    /// Names already in `bad_images.jsonl`: a resumed run meets them again.
    known_bad: HashSet<String>,
    title: String,
    config: String,
    facts: Vec<(&'static str, String)>,
    environment: Vec<(&'static str, String)>,
}

impl Records {
    /// Opens the journals, or goes on with them after the resumed step.
    pub(super) fn open(
        dir: PathBuf,
        config: &Config,
        options: &Options,
        plan: &Plan,
    ) -> Result<Self> {
        let viz = dir.join("viz");
        std::fs::create_dir_all(&viz).map_err(Error::io("create", &viz))?;
        let (title, step) = (options.title.as_str(), plan.resumed_from);
        let bad_images = BadImages::open(&dir, title, step)?;
        let known_bad = metrics::read::<BadImage>(&dir)?.into_iter().map(|bad| bad.name).collect();
        let peak = plan.peak.map_or_else(
            || "not measured: the host executor's times mean nothing".into(),
            |peak| {
                format!(
                    "{:.3} TFLOP/s in a product of {side} x {side}",
                    peak.flops_per_s / 1e12,
                    side = peak.side
                )
            },
        );
        let facts = vec![
            ("device", plan.device.clone()),
            ("peak", peak),
            ("batch", plan.batch.clone()),
            ("data", format!("{} images: {}", plan.images, plan.source)),
            ("parameters", plan.parameters.to_string()),
            ("memory", format!("{:.0} MiB", plan.memory_bytes as f64 / f64::from(1 << 20))),
            ("steps", format!("{}, {} in an epoch", plan.steps, plan.steps_per_epoch)),
        ];
        let environment = vec![
            ("pixmim", crate::VERSION.to_owned()),
            ("compiler", crate::RUSTC.to_owned()),
            ("command", options.command.clone()),
            ("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        ];
        Ok(Self {
            metrics: Metrics::open(&dir, title, step)?,
            bad_images,
            notices: Notices::open(&dir, title, step)?,
            events: EventFile::create(&dir, step)?,
            known_bad,
            title: title.to_owned(),
            config: config.to_toml()?,
            facts,
            environment,
            dir,
        })
    }

    /// The run folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.metrics.write(record)?;
        let mut curves = vec![
            ("train/loss", record.loss),
            ("train/lr", record.lr),
            ("train/grad_norm", record.grad_norm),
            ("speed/images_per_s", record.images_per_s),
            ("speed/data_wait", record.data_wait),
        ];
        if record.mfu.is_finite() {
            curves.extend([("speed/tflop_per_s", record.tflop_per_s), ("speed/mfu", record.mfu)]);
        }
        self.events.scalars(record.step, &curves)
    }

    pub(super) fn bad_image(&mut self, step: u64, bad: &source::BadImage) -> Result<()> {
        if !self.known_bad.insert(bad.name.clone()) {
            return Ok(());
        }
        let (name, reason) = (bad.name.clone(), bad.reason.clone());
        self.bad_images.write(&BadImage { step, name, reason })
    }

    pub(super) fn notice(&mut self, notice: &Notice) -> Result<()> {
        self.notices.write(notice)
    }

    pub(super) fn picture(&mut self, picture: &Picture, step: u64) -> Result<PathBuf> {
        let path = picture.write(&self.dir.join("viz"), step)?;
        let curves = [
            ("picture/psnr", picture.scores.prediction),
            ("picture/psnr_baseline", picture.scores.baseline()),
        ];
        self.events.scalars(step, &curves)?;
        self.events.image(step, "picture", picture.width, picture.height, &picture.png)?;
        Ok(path)
    }

    /// Writes the profile of a step; its folder.
    pub(super) fn profile(&self, profile: &StepProfile) -> Result<PathBuf> {
        let folder = self.dir.join(timing::FOLDER);
        profile.write(&folder)?;
        Ok(folder)
    }

    /// Waits until everything is on the disk: a checkpoint must not be ahead of its journals.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.metrics.sync()?;
        self.bad_images.sync()?;
        self.notices.sync()?;
        self.events.sync()
    }

    pub(super) fn report(
        &self,
        status: &str,
        state: &State,
        planned: u64,
        [images_per_s, mfu]: [f64; 2],
    ) -> Result<PathBuf> {
        let mut pictures = timeline::list(&self.dir.join("viz"))?;
        // A rewound run draws later ones anew.
        pictures.retain(|picture| picture.step <= state.step);
        let timeline = timeline::write(&self.dir, &pictures, TIMELINE_IMAGES)?;
        let profile = self.dir.join(timing::FOLDER).join(timing::DRAWING);
        report::write(
            &self.dir,
            &Report {
                title: &self.title,
                status,
                steps: state.step,
                planned,
                loss: state.smoothed_loss,
                images_per_s,
                mfu,
                records: &metrics::read::<StepRecord>(&self.dir)?,
                pictures: &pictures,
                timeline: timeline.as_deref(),
                profile: Some(profile.as_path()).filter(|path| path.is_file()),
                notices: &metrics::read::<Notice>(&self.dir)?,
                bad_images: &metrics::read::<BadImage>(&self.dir)?,
                facts: &self.facts,
                config: &self.config,
                environment: &self.environment,
            },
        )
    }
}
