//! Between a trainer's memory and files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use super::checkpoint::{
    self, Checkpoint, Contents, NamedTensor, NamedTensorMut, Part, State, TensorFile,
};
use super::config::{Auto, Config, Target};
use super::step::Trainer;
use crate::model::{Mae, MaeConfig};
use crate::{Cpu, Device, Error, Products, Result, Tensor};

/// Names of the fixed tensors.
const POSITIONS: [&str; 2] = ["pos_embed", "decoder_pos_embed"];

/// The numbers of a trainer that a checkpoint holds: its own memory on the CPU, copies of a GPU's.
pub(super) struct Snapshot<'a> {
    weights: Weights<'a>,
    exp_avg: Cow<'a, [f32]>,
    exp_avg_sq: Cow<'a, [f32]>,
}

struct Weights<'a> {
    trained: Cow<'a, [f32]>,
    positions: [Cow<'a, [f32]>; 2],
}

impl<'a> Weights<'a> {
    fn take(trainer: &'a Trainer) -> Result<Self> {
        let (dev, mae) = (trainer.device(), &trainer.mae);
        Ok(Self {
            trained: dev.read(mae.weights.flat())?,
            positions: [
                dev.read_f32(mae.pos_embed.view())?,
                dev.read_f32(mae.decoder_pos_embed.view())?,
            ],
        })
    }

    fn frozen(&self, mae: &'a Mae) -> Vec<NamedTensor<'_>> {
        let tables = POSITIONS.into_iter().zip([&mae.pos_embed, &mae.decoder_pos_embed]);
        let tables = tables.zip(&self.positions);
        tables
            .map(|((name, table), data)| NamedTensor { name, shape: position_shape(table), data })
            .collect()
    }
}

impl<'a> Snapshot<'a> {
    pub(super) fn take(trainer: &'a Trainer) -> Result<Self> {
        let dev = trainer.device();
        Ok(Self {
            weights: Weights::take(trainer)?,
            exp_avg: dev.read(trainer.exp_avg.flat())?,
            exp_avg_sq: dev.read(trainer.exp_avg_sq.flat())?,
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
        Contents {
            weights: named(mae, &self.weights.trained),
            frozen: self.weights.frozen(mae),
            exp_avg: named(mae, &self.exp_avg),
            exp_avg_sq: named(mae, &self.exp_avg_sq),
            metadata: metadata(trainer, config),
            state: state.clone(),
            matmul_plans: match trainer.device() {
                Device::Cuda(gpu) => gpu.matmul_plans(),
                Device::Cpu(_) => Vec::new(),
            },
        }
    }
}

/// What a user of the weights must know.
fn metadata(trainer: &Trainer, config: &Config) -> BTreeMap<String, String> {
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
    metadata.map(|(key, value)| (key.to_owned(), value)).into()
}

impl Config {
    /// Overwrites what a file of weights tells: the network's sizes, and, where a trainer of this crate wrote it, its heads,
    /// target and colours. The weights of MAE's authors tell no heads.
    ///
    /// # Errors
    /// [`Error::Config`] for a file of something else, naming the tensor; [`Error::Corrupt`] for metadata that makes no sense.
    pub fn follow(&mut self, file: &TensorFile) -> Result<()> {
        let [_, _, dim] = extents(file, "cls_token")?;
        let [_, _, decoder_dim] = extents(file, "mask_token")?;
        let [_, _, patch_size, _] = extents(file, "patch_embed.proj.weight")?;
        let [_, rows, _] = extents(file, "pos_embed")?;
        let [hidden, _] = extents(file, "blocks.0.mlp.fc1.weight")?;
        let depth = |of: &str| {
            let there = |l: &usize| file.shape(&format!("{of}.{l}.norm1.weight")).is_some();
            (0..).take_while(there).count()
        };
        self.model = MaeConfig {
            image_size: rows.saturating_sub(1).isqrt().saturating_mul(patch_size),
            patch_size,
            dim,
            depth: depth("blocks"),
            decoder_dim,
            decoder_depth: depth("decoder_blocks"),
            mlp_ratio: hidden.checked_div(dim).unwrap_or(0),
            heads: told(file, "heads")?.unwrap_or(self.model.heads),
            decoder_heads: told(file, "decoder_heads")?.unwrap_or(self.model.decoder_heads),
        };
        let Self { method, data, .. } = self;
        method.norm_pix = told(file, "norm_pix")?.unwrap_or(method.norm_pix);
        if let Some(target) = told::<String>(file, "target")? {
            method.target = if target == word(Target::Raw) { Target::Raw } else { Target::LowFreq };
        }
        method.radius = told(file, "radius")?.map_or(method.radius, Auto::Value);
        data.mean = colours(file, "mean")?.unwrap_or(data.mean);
        data.std = colours(file, "std")?.unwrap_or(data.std);
        Ok(())
    }
}

/// The shape of a tensor that every masked autoencoder has.
fn extents<const N: usize>(file: &TensorFile, name: &str) -> Result<[usize; N]> {
    let shape = file.shape(name).and_then(|shape| shape.try_into().ok());
    shape.ok_or_else(|| {
        let why = format!("`{name}` is missing or of other dimensions; it holds no weights of MAE");
        Error::config(file.path().display().to_string(), why)
    })
}

/// A value of the metadata, if it is there.
fn told<T: FromStr>(file: &TensorFile, key: &str) -> Result<Option<T>> {
    let Some(text) = file.metadata().get(key) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        Error::corrupt(file.path(), format!("its metadata has {key} = {text:?}, which is no value"))
    })
}

fn colours(file: &TensorFile, key: &str) -> Result<Option<[f64; 3]>> {
    let Some(text) = told::<String>(file, key)? else { return Ok(None) };
    let numbers: Option<Vec<f64>> = text.split(',').map(|number| number.parse().ok()).collect();
    let numbers = numbers.and_then(|numbers| numbers.try_into().ok());
    numbers.map(Some).ok_or_else(|| {
        let why = format!("its metadata has {key} = {text:?}, which is not three numbers");
        Error::corrupt(file.path(), why)
    })
}

/// A choice as configs spell it.
fn word(choice: impl serde::Serialize) -> String {
    let value = toml::Value::try_from(choice).ok();
    value.and_then(|value| Some(value.as_str()?.to_owned())).expect("a choice is a word")
}

/// How a trainer multiplies matrices, in a word.
pub(super) fn products(trainer: &Trainer) -> &'static str {
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

impl Trainer {
    /// Writes the weights as a safetensors file, as `model.safetensors` of a checkpoint is, in place of what is there: a
    /// reader sees the old file or the new one. `config` tells what their user must know. f32 and bf16 networks only.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Diverged`] if a weight is not finite; [`Error::DType`] for a network in f64.
    pub fn save_weights(&self, path: &Path, config: &Config) -> Result<()> {
        let weights = Weights::take(self)?;
        let mut tensors = named(&self.mae, &weights.trained);
        tensors.extend(weights.frozen(&self.mae));
        checkpoint::save_weights(path, &tensors, &metadata(self, config), self.updates()?)
    }

    /// Takes over the weights and positions of a file. Nothing changes unless it holds exactly this network's.
    ///
    /// # Errors
    /// As [`TensorFile::read`]; [`Error::DType`] for a network in f64.
    pub fn load_weights(&mut self, file: &mut TensorFile) -> Result<()> {
        self.load(|out| file.read(out))
    }

    /// Takes over weights, positions, moments and the count of updates.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; [`Error::DType`] for a network in f64.
    pub fn load_checkpoint(&mut self, found: &mut Checkpoint) -> Result<()> {
        self.load(|out| found.read(Part::Model, out))?;
        // Through the host, where the file is read; the padding between tensors stays zero.
        let mut flat = vec![0f32; self.mae.weights.elems()];
        let dev = self.device().clone();
        found.read(Part::ExpAvg, &mut named_mut(&self.mae, &mut flat))?;
        dev.upload(self.exp_avg.flat_mut(), &flat)?;
        found.read(Part::ExpAvgSq, &mut named_mut(&self.mae, &mut flat))?;
        dev.upload(self.exp_avg_sq.flat_mut(), &flat)?;
        self.set_updates(found.state.step.saturating_sub(found.state.skipped))
    }

    fn load(&mut self, read: impl FnOnce(&mut [NamedTensorMut<'_>]) -> Result<()>) -> Result<()> {
        let mut flat = vec![0f32; self.mae.weights.elems()];
        let tables = [&self.mae.pos_embed, &self.mae.decoder_pos_embed];
        let shapes = tables.map(position_shape);
        let mut positions = tables.map(|table| vec![0f32; table.view().elems()]);
        let mut model = named_mut(&self.mae, &mut flat);
        for ((name, shape), data) in POSITIONS.into_iter().zip(shapes).zip(&mut positions) {
            model.push(NamedTensorMut { name, shape, data });
        }
        read(&mut model)?;
        let dev = self.device().clone();
        dev.upload(self.mae.weights.flat_mut(), &flat)?;
        self.mae.set_positions(&dev, &positions)?;
        self.mae.round(&dev)
    }
}
