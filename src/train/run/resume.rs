//! Between a trainer's memory and its checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Resume;
use crate::TensorList;
use crate::model::params::Spec;
use crate::train::checkpoint::{
    self, Checkpoint, Contents, NamedTensor, NamedTensorMut, Part, State,
};
use crate::train::config::{Config, Resolved};
use crate::train::files::write_atomic;
use crate::train::step::{Outcome, Trainer};
use crate::{Cpu, Device, Error, Products, Result, Tensor};

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

/// All of a trainer that a checkpoint holds.
pub(super) fn contents<'a>(trainer: &'a Trainer, config: &Config, state: &State) -> Contents<'a> {
    let specs = trainer.mae.table().specs();
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
        weights: named(specs, &mae.weights),
        frozen: POSITIONS
            .into_iter()
            .zip([&mae.pos_embed, &mae.decoder_pos_embed])
            .map(|(name, tensor)| NamedTensor {
                name,
                shape: position_shape(tensor),
                data: tensor.view().as_slice(),
            })
            .collect(),
        exp_avg: named(specs, &trainer.exp_avg),
        exp_avg_sq: named(specs, &trainer.exp_avg_sq),
        metadata: metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        state: state.clone(),
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

fn named<'a>(specs: &'a [Spec], list: &'a TensorList) -> Vec<NamedTensor<'a>> {
    let tensors = specs.iter().enumerate();
    tensors
        .map(|(i, spec)| NamedTensor {
            name: &spec.name,
            shape: spec.shape.clone(),
            data: list.view(i).as_slice(),
        })
        .collect()
}

fn named_mut<'a>(specs: &'a [Spec], list: &'a mut TensorList) -> Vec<NamedTensorMut<'a>> {
    let tensors = specs.iter().zip(list.iter_mut());
    tensors
        .map(|(spec, tensor)| NamedTensorMut {
            name: &spec.name,
            shape: spec.shape.clone(),
            data: tensor.into_slice(),
        })
        .collect()
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
    }
    trainer.set_updates(found.state.step - found.state.skipped)?;
    *state = found.state;
    Ok(Some(state.step))
}

fn read(found: &mut Checkpoint, trainer: &mut Trainer) -> Result<()> {
    let specs = trainer.mae.table().specs().to_vec();
    let mae = &mut trainer.mae;
    let mut model = named_mut(&specs, &mut mae.weights);
    for (name, tensor) in
        POSITIONS.into_iter().zip([&mut mae.pos_embed, &mut mae.decoder_pos_embed])
    {
        let shape = position_shape(tensor);
        model.push(NamedTensorMut { name, shape, data: tensor.view_mut().into_slice() });
    }
    found.read(Part::Model, &mut model)?;
    found.read(Part::ExpAvg, &mut named_mut(&specs, &mut trainer.exp_avg))?;
    found.read(Part::ExpAvgSq, &mut named_mut(&specs, &mut trainer.exp_avg_sq))
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
