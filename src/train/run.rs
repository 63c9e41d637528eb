//! The loop: data, steps, logs, pictures, checkpoints, signals.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Result;
use crate::train::StepRecord;
use crate::train::config::Config;

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

/// What is asked of one call of [`run`], beside the config.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where to start from.
    pub resume: Resume,
    /// Replace what an existing run folder holds.
    pub overwrite: bool,
    /// Measure some steps, write nothing.
    pub dry_run: bool,
    /// Words for the report and the log: the command line, the preset, the method.
    pub title: String,
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
    /// Updates in all.
    pub steps: u64,
    /// Updates in an epoch.
    pub steps_per_epoch: u64,
    /// Updates done before this call.
    pub resumed_from: Option<u64>,
    /// The run folder; none in a dry run.
    pub folder: Option<PathBuf>,
}

/// Told while [`run`] works, in order.
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
    /// Images per second over the steps of this call, first step excluded.
    pub images_per_s: f64,
    /// Share of that time spent waiting for data.
    pub data_wait: f64,
    /// The report; none in a dry run.
    pub report: Option<PathBuf>,
    /// A signal ended the run before its last step.
    pub interrupted: bool,
}

/// Trains as `config` says. `stop` is polled between steps, while waiting for data and while drawing pictures: when
/// it turns true the run saves and returns. Everything worth showing is told to `tell`; nothing is printed.
///
/// # Errors
/// See [`crate::Error`]; each has the exit code of a program that ends with it.
pub fn run(
    config: &Config,
    options: &Options,
    stop: &std::sync::atomic::AtomicBool,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Summary> {
    let _ = (config, options, stop, tell);
    Err(crate::Error::invalid("run", "is to come"))
}
