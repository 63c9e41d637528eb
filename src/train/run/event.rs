//! What is asked of a run, and what it tells.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::ops::cost::Cost;
use crate::train::timing::StepProfile;
use crate::train::{StepRecord, peaks};
use crate::{DType, Device, Result};

/// Where a run starts from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// From step 0, in a new folder.
    #[default]
    No,
    /// From the newest sound checkpoint of the run folder, or from step 0 if it has none.
    Auto,
    /// From this checkpoint folder.
    From(PathBuf),
}

/// What is asked of one call of [`run`](super::run), beside the config.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where to start from.
    pub resume: Resume,
    /// Replace what an existing run folder holds.
    pub overwrite: bool,
    /// Measure some steps, write nothing.
    pub dry_run: bool,
    /// Measure where the time of a step goes, before the first one. Changes no bit of the run.
    pub profile: bool,
    /// The run's name, for its report and journals: "demo, pixmim".
    pub title: String,
    /// The command line, for the report; may be empty.
    pub command: String,
}

/// What is settled before the first step.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Device and precision, and why these: "cpu (2 cores, bf16 products): ...".
    pub device: String,
    /// Batch arithmetic: "global 64 = 1 x 64 micro; lr 1e-3 = 1.5e-4 * 64 / 256".
    pub batch: String,
    /// Peak learning rate.
    pub lr: f64,
    /// Images found.
    pub images: u64,
    /// Where they come from.
    pub source: String,
    /// Trainable parameters.
    pub parameters: usize,
    /// Bytes of all arenas.
    pub memory_bytes: usize,
    /// What a step must move and compute.
    pub step_cost: Cost,
    /// What utilisation is measured against; none on the host executor, whose times mean nothing.
    pub peak: Option<Peak>,
    /// Updates in all.
    pub steps: u64,
    /// Updates in an epoch.
    pub steps_per_epoch: u64,
    /// Updates done before this call.
    pub resumed_from: Option<u64>,
    /// The run folder; none in a dry run.
    pub folder: Option<PathBuf>,
}

/// What the device reaches in one large product, measured before the first step.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Operations in a second.
    pub flops_per_s: f64,
    /// Side of the square matrices.
    pub side: usize,
    /// How long the measurement took.
    pub took: Duration,
}

impl Peak {
    /// None on the host executor.
    pub(super) fn measure(device: &Device, dtype: DType) -> Result<Option<Self>> {
        if matches!(device, Device::Cuda(gpu) if gpu.properties().executor) {
            return Ok(None);
        }
        let start = Instant::now();
        let product = peaks::product(device, dtype)?;
        let (flops_per_s, side) = (product.flops_per_second(), product.size);
        Ok(Some(Self { flops_per_s, side, took: start.elapsed() }))
    }
}

/// Told while [`run`](super::run) works, in order.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Before the first step.
    Start(&'a Plan),
    /// After every step.
    Step {
        /// The step's figures.
        record: &'a StepRecord,
        /// Exponentially smoothed loss.
        smoothed_loss: f64,
        /// Time to the last step, at the pace so far.
        eta: Duration,
        /// Whether this step stands in the metrics too.
        logged: bool,
    },
    /// Where the time of a step goes, and the folder that has it; none in a dry run.
    Profile(&'a StepProfile, Option<&'a Path>),
    /// A picture was written.
    Picture(&'a Path),
    /// A checkpoint was written.
    Checkpoint(&'a Path),
    /// Something the user should know: an unreadable image, a skipped step, a rejected checkpoint, slow data.
    Warning(&'a str),
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Updates done in all.
    pub steps: u64,
    /// Smoothed loss at the end.
    pub loss: f64,
    /// Images per second over the steps of this call, the first one excluded if there are more; 0 if there is none.
    pub images_per_s: f64,
    /// Share of that time spent waiting for data.
    pub data_wait: f64,
    /// Useful operations of products over the same steps, 1e12 a second; not a number on the host executor.
    pub tflop_per_s: f64,
    /// Their share of the plan's peak: model FLOPs utilisation. Not a number on the host executor.
    pub mfu: f64,
    /// The report; none in a dry run.
    pub report: Option<PathBuf>,
    /// A signal ended the run before its last step.
    pub interrupted: bool,
}
