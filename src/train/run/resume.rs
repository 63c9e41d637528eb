//! Between a trainer's memory and its checkpoints.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Resume;
use crate::model::Mae;
use crate::train::checkpoint::{
    self, Checkpoint, Contents, NamedTensor, NamedTensorMut, Part, State,
};
use crate::train::config::{Config, Resolved};
use crate::train::files::write_atomic;
use crate::train::step::{Outcome, Trainer};
use crate::{Cpu, Device, Error, Gpu, Products, Result, Tensor};

/// Names of the fixed tensors.
const POSITIONS: [&str; 2] = ["pos_embed", "decoder_pos_embed"];

/// Names what must stay the same for a checkpoint to be gone on from.
pub(super) fn config_hash(config: &Config, resolved: &Resolved) -> String {
    let (model, method) = (&config.model, &config.method);
    checkpoint::config_hash(&format!(
        "{model:?}\n{method:?}\n{} {}",
        resolved.radius, resolved.padding
    ))
}

/// The numbers of a trainer that a checkpoint holds: its own memory on the CPU, copies of a GPU's.
pub(super) struct Snapshot<'a> {
    weights: Cow<'a, [f32]>,
    exp_avg: Cow<'a, [f32]>,
    exp_avg_sq: Cow<'a, [f32]>,
    positions: [Cow<'a, [f32]>; 2],
}

impl<'a> Snapshot<'a> {
    pub(super) fn take(trainer: &'a Trainer) -> Result<Self> {
        let (dev, mae) = (trainer.device(), &trainer.mae);
        Ok(Self {
            weights: dev.read(mae.weights.flat())?,
            exp_avg: dev.read(trainer.exp_avg.flat())?,
            exp_avg_sq: dev.read(trainer.exp_avg_sq.flat())?,
            positions: [
                dev.read_f32(mae.pos_embed.view())?,
                dev.read_f32(mae.decoder_pos_embed.view())?,
            ],
        })
    }

    /// All that a checkpoint holds.
    pub(super) fn contents(
        &self,
        trainer: &'a Trainer,
        config: &Config,
        state: &State,
    ) -> Contents<'_> {
        let mae = &trainer.mae;
        let words = |numbers: [f64; 3]| numbers.map(|x| x.to_string()).join(",");
        let resolved = config.resolved();
        let metadata = [
            ("norm_pix", config.method.norm_pix.to_string()),
            ("target", word(config.method.target)),
            ("radius", resolved.radius.to_string()),
            ("crop", word(config.method.crop)),
            ("mean", words(config.data.mean)),
            ("std", words(config.data.std)),
            ("patch", config.model.patch_size.to_string()),
            ("image", config.model.image_size.to_string()),
            ("heads", config.model.heads.to_string()),
            ("decoder_heads", config.model.decoder_heads.to_string()),
            ("products", products(trainer).to_owned()),
        ];
        Contents {
            weights: named(mae, &self.weights),
            frozen: POSITIONS
                .into_iter()
                .zip([&mae.pos_embed, &mae.decoder_pos_embed])
                .zip(&self.positions)
                .map(|((name, tensor), data)| NamedTensor {
                    name,
                    shape: position_shape(tensor),
                    data,
                })
                .collect(),
            exp_avg: named(mae, &self.exp_avg),
            exp_avg_sq: named(mae, &self.exp_avg_sq),
            metadata: metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            state: state.clone(),
            matmul_plans: match trainer.device() {
                Device::Cuda(gpu) => gpu.matmul_plans(),
                Device::Cpu(_) => Vec::new(),
            },
        }
    }
}

/// A choice as configs spell it.
fn word(choice: impl serde::Serialize) -> String {
    let value = toml::Value::try_from(choice).ok();
    value.and_then(|value| Some(value.as_str()?.to_owned())).expect("a choice is a word")
}

fn products(trainer: &Trainer) -> &'static str {
    match trainer.device() {
        Device::Cuda(_) => "cuda",
        Device::Cpu(Cpu { products: Products::F32 }) => "f32",
        Device::Cpu(Cpu { products: Products::Bf16 }) => "bf16",
    }
}

/// Positions have the batch's dimension in front, as in MAE's checkpoints.
fn position_shape(tensor: &Tensor) -> Vec<usize> {
    [&[1], tensor.shape()].concat()
}

/// The tensors of a list like the weights, by name.
fn named<'a>(mae: &'a Mae, flat: &'a [f32]) -> Vec<NamedTensor<'a>> {
    let tensors = mae.table().specs().iter().enumerate();
    tensors
        .map(|(i, spec)| NamedTensor {
            name: &spec.name,
            shape: spec.shape.clone(),
            data: &flat[mae.weights.offset(i)..][..spec.shape.iter().product()],
        })
        .collect()
}

/// As [`named`], writable.
fn named_mut<'a>(mae: &'a Mae, mut flat: &'a mut [f32]) -> Vec<NamedTensorMut<'a>> {
    let mut at = 0;
    let mut tensors = Vec::new();
    for (i, spec) in mae.table().specs().iter().enumerate() {
        let (_, rest) = flat.split_at_mut(mae.weights.offset(i) - at);
        let (data, rest) = rest.split_at_mut(spec.shape.iter().product());
        at = mae.weights.offset(i) + data.len();
        flat = rest;
        tensors.push(NamedTensorMut { name: &spec.name, shape: spec.shape.clone(), data });
    }
    tensors
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
    read(&mut found, trainer)?;
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
    trainer.set_updates(found.state.step - found.state.skipped)?;
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

fn read(found: &mut Checkpoint, trainer: &mut Trainer) -> Result<()> {
    let dev = trainer.device().clone();
    // Through the host, where the file is read; the padding between tensors stays zero.
    let mut flat = vec![0f32; trainer.mae.weights.elems()];
    let tables = [&trainer.mae.pos_embed, &trainer.mae.decoder_pos_embed];
    let shapes = tables.map(position_shape);
    let mut positions = tables.map(|table| vec![0f32; table.view().elems()]);
    let mut model = named_mut(&trainer.mae, &mut flat);
    for ((name, shape), data) in POSITIONS.into_iter().zip(shapes).zip(&mut positions) {
        model.push(NamedTensorMut { name, shape, data });
    }
    found.read(Part::Model, &mut model)?;
    dev.upload(trainer.mae.weights.flat_mut(), &flat)?;
    trainer.mae.set_positions(&dev, &positions)?;
    trainer.mae.round(&dev)?;
    found.read(Part::ExpAvg, &mut named_mut(&trainer.mae, &mut flat))?;
    dev.upload(trainer.exp_avg.flat_mut(), &flat)?;
    found.read(Part::ExpAvgSq, &mut named_mut(&trainer.mae, &mut flat))?;
    dev.upload(trainer.exp_avg_sq.flat_mut(), &flat)
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
