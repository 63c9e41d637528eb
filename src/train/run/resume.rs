//! Where a run goes on, and what it leaves when it cannot.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Resume;
use crate::train::checkpoint::{self, Checkpoint, State};
use crate::train::config::{Config, Resolved};
use crate::train::files::write_atomic;
use crate::train::state::products;
use crate::train::step::{Outcome, Trainer};
use crate::{Device, Error, Gpu, Result};

/// Names what must stay the same for a checkpoint to be gone on from.
pub(super) fn config_hash(config: &Config, resolved: &Resolved) -> String {
    let (model, method) = (&config.model, &config.method);
    checkpoint::config_hash(&format!(
        "{model:?}\n{method:?}\n{} {}",
        resolved.radius, resolved.padding
    ))
}

/// Puts a trainer where a checkpoint left one. Returns the step, if there was one to go on from; what the user should
/// know goes to `warnings`.
pub(super) fn load(
    resume: &Resume,
    dir: &Path,
    trainer: &mut Trainer,
    state: &mut State,
    warnings: &mut Vec<String>,
) -> Result<Option<u64>> {
    let mut found = match resume {
        Resume::No => return Ok(None),
        Resume::From(path) => Checkpoint::open(path)?,
        Resume::Auto => {
            let (newest, rejected) = checkpoint::newest(dir)?;
            for rejected in &rejected {
                warnings.push(format!(
                    "checkpoint {} is rejected: {}",
                    rejected.path.display(),
                    rejected.why
                ));
            }
            match newest {
                Some(found) => found,
                None if rejected.is_empty() => return Ok(None),
                None => {
                    let why = format!(
                        "no checkpoint of it is sound ({}); restore one, or start anew with --overwrite",
                        warnings.join("; ")
                    );
                    return Err(Error::corrupt(dir.join("ckpt"), why));
                }
            }
        }
    };
    let place = found.path.display().to_string();
    trainer.load_checkpoint(&mut found)?;
    found.check_config(&state.config_hash)?;
    if found.state.seed != state.seed {
        let why = format!("was saved with seed {}; give --seed {0}", found.state.seed);
        return Err(Error::config(place, why));
    }
    if found.state.steps_per_epoch != state.steps_per_epoch {
        let why = format!(
            "was saved with {} steps in an epoch, now there are {}; the images or optim.global_batch changed",
            found.state.steps_per_epoch, state.steps_per_epoch
        );
        return Err(Error::config(place, why));
    }
    if let Some(before) = found.metadata().get("products").filter(|&p| p != products(trainer)) {
        warnings.push(format!(
            "the run went on with {} products, before it had {before}: losses will differ a little",
            products(trainer)
        ));
    } else if let Device::Cuda(gpu) = trainer.device()
        && let Err(why) = multiply_as_before(gpu, &found.matmul_plans)
    {
        warnings.push(format!(
            "matrix products of {place} are planned anew: losses will differ a little ({why})"
        ));
    }
    *state = found.state;
    Ok(Some(state.step))
}

/// Has a GPU multiply by the plans of a checkpoint, or says why it cannot.
fn multiply_as_before(gpu: &Gpu, plans: &[u8]) -> Result<(), String> {
    if !plans.is_empty() {
        return gpu.load_matmul_plans(plans).map(drop);
    }
    // The host executor multiplies in one way, and has nothing to plan.
    if gpu.matmul_plans().is_empty() { Ok(()) } else { Err("it has no plans".into()) }
}

/// Writes `dump/step-<n>.json` about a step that was not taken: enough to draw its images and masks again, and to see
/// where the gradient was lost.
pub(super) fn dump(
    dir: &Path,
    state: &State,
    outcome: Outcome,
    samples: &[i64],
    trainer: &Trainer,
) -> Result<PathBuf> {
    let folder = dir.join("dump");
    std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    let norms: BTreeMap<_, _> =
        trainer.grad_norms()?.into_iter().map(|(name, norm)| (name, norm.to_string())).collect();
    let text = serde_json::json!({
        "step": state.step,
        "seed": state.seed,
        "epoch": (state.step - 1) / state.steps_per_epoch,
        "loss": outcome.loss.to_string(),
        "grad_norm": outcome.grad_norm.to_string(),
        "samples": samples,
        "grad_norms": norms,
    });
    let path = folder.join(format!("step-{:08}.json", state.step));
    write_atomic(&path, format!("{text:#}\n").as_bytes())?;
    Ok(path)
}
