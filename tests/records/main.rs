//! What a run leaves behind: journals, TensorBoard events, pictures, the report.

#![cfg(feature = "train")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod journals;
mod pictures;
mod reports;
mod tensorboard;

use pixmim::train::StepRecord;

fn record(step: u64) -> StepRecord {
    StepRecord {
        step,
        epoch: step as f64 / 4.0,
        loss: 1.0 / (step as f64 + 1.0),
        lr: 2.5e-4,
        grad_norm: 0.5,
        images_per_s: 329.0,
        data_wait: 0.125,
        tflop_per_s: 1.5,
        mfu: 0.625,
    }
}
