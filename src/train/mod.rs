//! The trainer: config, step, schedule, checkpoints, and what a run leaves behind.

mod canvas;
pub mod checkpoint;
pub mod config;
pub mod cost;
mod feed;
mod files;
mod font;
pub mod metrics;
pub mod peaks;
pub mod pictures;
mod plan;
pub mod report;
mod resample;
pub mod run;
pub mod schedule;
pub mod signal;
mod state;
pub mod step;
mod svg;
pub mod tensorboard;
pub mod timeline;
pub mod timing;

/// One logged step.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StepRecord {
    /// Updates done, this one included.
    pub step: u64,
    /// Passes over the data done.
    pub epoch: f64,
    /// Mean loss of the step's images; not finite when the step was skipped.
    #[serde(deserialize_with = "metrics::null_is_nan")]
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// L2 norm of the gradient, before clipping.
    #[serde(deserialize_with = "metrics::null_is_nan")]
    pub grad_norm: f64,
    /// Images per second since the line before.
    #[serde(deserialize_with = "metrics::null_is_nan")]
    pub images_per_s: f64,
    /// Share of that time spent waiting for data, 0 to 1.
    #[serde(deserialize_with = "metrics::null_is_nan")]
    pub data_wait: f64,
    /// Useful operations of products, 1e12 a second, waits included: the model's TFLOP/s. Not a number where it means
    /// nothing, on the host executor, and in records of older versions.
    #[serde(default = "metrics::nan", deserialize_with = "metrics::null_is_nan")]
    pub tflop_per_s: f64,
    /// Model FLOPs utilisation: [`tflop_per_s`](Self::tflop_per_s) as a share of what one large product reached before the
    /// first step. Not a number as above.
    #[serde(default = "metrics::nan", deserialize_with = "metrics::null_is_nan")]
    pub mfu: f64,
}
