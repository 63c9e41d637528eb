//! The table of parameters: name, shape, initial values and weight decay of each, in one place.
//!
//! Names and shapes are those of the original MAE checkpoints.

use half::bf16;
use rayon::prelude::*;

use super::MaeConfig;
use crate::rng::{Purpose, Stream};
use crate::tensor::Shape;
use crate::{DType, Device, Result, TensorList, TensorMut};

/// How a tensor starts (`initialize_weights` of the MAE source).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All the same.
    Constant(f64),
    /// Uniform on `[-bound, bound)`.
    Uniform {
        /// Largest magnitude.
        bound: f64,
    },
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
}

/// Which tensors lie together in memory, so that each optimizer group is one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Matrices: always decay.
    Matrix,
    /// Class and mask token: decay in MAE's source, not in PixMIM's.
    Token,
    /// Biases and layer norms: never decay.
    Vector,
}

/// One trainable tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Name in a checkpoint.
    pub name: String,
    /// Shape in a checkpoint.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// Optimizer group.
    pub group: Group,
}

/// Indices of a layer's two tensors in the table.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// Its matrix, or a layer norm's scale.
    pub weight: usize,
    /// Its bias.
    pub bias: usize,
}

/// Indices of a transformer block's tensors.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Layer norm before attention.
    pub norm1: Layer,
    /// Queries, keys and values.
    pub qkv: Layer,
    /// Attention's output projection.
    pub proj: Layer,
    /// Layer norm before the MLP.
    pub norm2: Layer,
    /// MLP, first layer.
    pub fc1: Layer,
    /// MLP, second layer.
    pub fc2: Layer,
}

/// All trainable tensors of a masked autoencoder, groups one after another.
#[derive(Clone, Debug)]
pub struct Table {
    specs: Vec<Spec>,
    /// Class token.
    pub cls_token: usize,
    /// Patch embedding.
    pub patch_embed: Layer,
    /// Encoder blocks.
    pub blocks: Vec<Block>,
    /// Encoder's final layer norm.
    pub norm: Layer,
    /// From encoder to decoder width.
    pub decoder_embed: Layer,
    /// Mask token.
    pub mask_token: usize,
    /// Decoder blocks.
    pub decoder_blocks: Vec<Block>,
    /// Decoder's final layer norm.
    pub decoder_norm: Layer,
    /// Prediction of pixels.
    pub decoder_pred: Layer,
}

/// Lists tensors in the checkpoint's order; [`Table::new`] then sorts them by group.
#[derive(Default)]
struct Lister {
    specs: Vec<Spec>,
}

impl Lister {
    fn push(&mut self, name: String, shape: &[usize], init: Init, group: Group) -> usize {
        self.specs.push(Spec { name, shape: shape.to_vec(), init, group });
        self.specs.len() - 1
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) -> Layer {
        // Xavier, over the joint matrix of queries, keys and values too.
        let bound = (6.0 / (inputs + outputs) as f64).sqrt();
        let shape = [outputs, inputs];
        Layer {
            weight: self.push(
                format!("{name}.weight"),
                &shape,
                Init::Uniform { bound },
                Group::Matrix,
            ),
            bias: self.push(format!("{name}.bias"), &[outputs], Init::Constant(0.0), Group::Vector),
        }
    }

    fn norm(&mut self, name: &str, dim: usize) -> Layer {
        Layer {
            weight: self.push(format!("{name}.weight"), &[dim], Init::Constant(1.0), Group::Vector),
            bias: self.push(format!("{name}.bias"), &[dim], Init::Constant(0.0), Group::Vector),
        }
    }

    fn token(&mut self, name: &str, dim: usize) -> usize {
        self.push(name.into(), &[1, 1, dim], Init::Normal { std: 0.02 }, Group::Token)
    }

    fn block(&mut self, prefix: &str, dim: usize, mlp_ratio: usize) -> Block {
        Block {
            norm1: self.norm(&format!("{prefix}.norm1"), dim),
            qkv: self.linear(&format!("{prefix}.attn.qkv"), dim, 3 * dim),
            proj: self.linear(&format!("{prefix}.attn.proj"), dim, dim),
            norm2: self.norm(&format!("{prefix}.norm2"), dim),
            fc1: self.linear(&format!("{prefix}.mlp.fc1"), dim, mlp_ratio * dim),
            fc2: self.linear(&format!("{prefix}.mlp.fc2"), mlp_ratio * dim, dim),
        }
    }
}

impl Table {
    /// The table of a network of these sizes.
    #[must_use]
    pub fn new(config: &MaeConfig) -> Self {
        let MaeConfig { patch_size, dim, decoder_dim, mlp_ratio, .. } = *config;
        let numbers = config.patch_numbers();
        let mut list = Lister::default();
        let cls_token = list.token("cls_token", dim);
        let mask_token = list.token("mask_token", decoder_dim);
        // Xavier on the view (D, E); the bias keeps the default of a PyTorch convolution, which nothing resets.
        let bound = (6.0 / (numbers + dim) as f64).sqrt();
        let bias_bound = (numbers as f64).sqrt().recip();
        let patch_embed = Layer {
            weight: list.push(
                "patch_embed.proj.weight".into(),
                &[dim, 3, patch_size, patch_size],
                Init::Uniform { bound },
                Group::Matrix,
            ),
            bias: list.push(
                "patch_embed.proj.bias".into(),
                &[dim],
                Init::Uniform { bound: bias_bound },
                Group::Vector,
            ),
        };
        let blocks =
            (0..config.depth).map(|l| list.block(&format!("blocks.{l}"), dim, mlp_ratio)).collect();
        let norm = list.norm("norm", dim);
        let decoder_embed = list.linear("decoder_embed", dim, decoder_dim);
        let decoder_blocks = (0..config.decoder_depth)
            .map(|l| list.block(&format!("decoder_blocks.{l}"), decoder_dim, mlp_ratio))
            .collect();
        let decoder_norm = list.norm("decoder_norm", decoder_dim);
        let decoder_pred = list.linear("decoder_pred", decoder_dim, numbers);
        let table = Self {
            specs: list.specs,
            cls_token,
            patch_embed,
            blocks,
            norm,
            decoder_embed,
            mask_token,
            decoder_blocks,
            decoder_norm,
            decoder_pred,
        };
        table.sorted_by_group()
    }

    fn sorted_by_group(mut self) -> Self {
        let mut order: Vec<usize> = (0..self.specs.len()).collect();
        order.sort_by_key(|&i| self.specs[i].group);
        let mut place = vec![0; order.len()];
        order.iter().enumerate().for_each(|(to, &from)| place[from] = to);
        self.specs = order.into_iter().map(|from| self.specs[from].clone()).collect();
        let layer = |layer: &mut Layer| {
            *layer = Layer { weight: place[layer.weight], bias: place[layer.bias] };
        };
        self.cls_token = place[self.cls_token];
        self.mask_token = place[self.mask_token];
        for l in [
            &mut self.patch_embed,
            &mut self.norm,
            &mut self.decoder_embed,
            &mut self.decoder_norm,
            &mut self.decoder_pred,
        ] {
            layer(l);
        }
        for b in self.blocks.iter_mut().chain(&mut self.decoder_blocks) {
            let Block { norm1, qkv, proj, norm2, fc1, fc2 } = b;
            [norm1, qkv, proj, norm2, fc1, fc2].into_iter().for_each(layer);
        }
        self
    }

    /// The tensors, in the order of memory.
    #[must_use]
    pub fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// The shapes, in the order of memory.
    #[must_use]
    pub fn shapes(&self) -> Vec<Shape> {
        self.specs.iter().map(|spec| Shape::from(&spec.shape[..])).collect()
    }

    /// Number of trainable parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum()
    }

    /// Number of tensors that decay: they come first.
    #[must_use]
    pub fn decaying(&self, decay_tokens: bool) -> usize {
        let last = if decay_tokens { Group::Token } else { Group::Matrix };
        self.specs.iter().filter(|spec| spec.group <= last).count()
    }

    /// Writes the initial values: functions of the seed and each tensor's name.
    ///
    /// # Errors
    /// [`Error::Gpu`](crate::Error::Gpu).
    pub fn init(&self, dev: &Device, weights: &mut TensorList, seed: u64) -> Result<()> {
        // The padding between tensors counts in the gradient's norm and in the update.
        dev.clear(weights.flat_mut())?;
        for (i, spec) in self.specs.iter().enumerate() {
            let stream = Stream::new(seed, 0, fnv1a(&spec.name), Purpose::Init);
            let value = |at: usize| match spec.init {
                Init::Constant(value) => value,
                Init::Uniform { bound } => bound * (2.0 * stream.uniform(at as u32) - 1.0),
                Init::Normal { std } => std * stream.normal(at as u32),
            };
            let [tensor] = weights.views_mut([i]);
            write(dev, tensor, value)?;
        }
        Ok(())
    }
}

/// Sets element `i` of a tensor of real numbers to `value(i)`, rounded to its dtype.
pub(crate) fn write(
    dev: &Device,
    tensor: TensorMut<'_>,
    value: impl Fn(usize) -> f64 + Send + Sync,
) -> Result<()> {
    let all = (0..tensor.elems()).into_par_iter().map(value);
    match tensor.dtype() {
        DType::F64 => dev.upload(tensor, &all.collect::<Vec<f64>>()),
        DType::Bf16 => dev.upload(tensor, &all.map(bf16::from_f64).collect::<Vec<_>>()),
        _ => dev.upload(tensor, &all.map(|x| x as f32).collect::<Vec<_>>()),
    }
}

/// FNV-1a, 64 bits.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
