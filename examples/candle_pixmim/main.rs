//! A masked autoencoder written in candle, trained twice from the same weights on the bundled photos: once with
//! `pixmim::candle`'s low-pass target, loss and attention, once with the same in candle's own ops. The losses must agree;
//! what the ops cost stands below them.

use std::error::Error;
use std::iter::zip;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{D, DType, Device, IndexOp, Result, Tensor, Var};
use pixmim::candle::LowFreqTarget;
use pixmim::data::augment;
use pixmim::data::decode::Options;
use pixmim::data::source::Source;
use pixmim::data::{IMAGENET_MEAN, IMAGENET_STD};
use pixmim::ops::low_freq_target::Filter;
use pixmim::rng::{Purpose, Stream};
use pixmim::train::config::Interpolation;

use in_candle::LowPass;

mod in_candle;

const STEPS: usize = 24;
/// Photos of a step.
const BATCH: usize = 32;
/// Pixels along a side of a photo.
const SIDE: usize = 64;
/// Pixels along a side of a patch.
const PATCH: usize = 8;
/// Patches of a photo.
const PATCHES: usize = (SIDE / PATCH) * (SIDE / PATCH);
/// Patches that the encoder sees.
const KEPT: usize = PATCHES / 4;
/// Numbers of a patch.
const NUMBERS: usize = 3 * PATCH * PATCH;
/// Width of the network.
const DIM: usize = 96;
const HEADS: usize = 3;
const ENCODER_BLOCKS: usize = 2;
const DECODER_BLOCKS: usize = 1;
/// PixMIM's radius of 40 at 224, at the same cycles per pixel.
const RADIUS: f64 = 40.0 * SIDE as f64 / 224.0;

/// Whose ops stand where this crate has one.
enum Ops {
    Pixmim(Box<Filter>),
    Candle(LowPass),
}

impl Ops {
    fn target(&self, pixels: &Tensor, ids_masked: &Tensor) -> Result<Tensor> {
        let (mean, std) = (IMAGENET_MEAN, IMAGENET_STD);
        match self {
            Self::Pixmim(filter) => {
                let how = LowFreqTarget { filter, mean, std, patch_size: PATCH };
                pixmim::candle::low_freq_target(pixels, ids_masked, how)
            }
            Self::Candle(low_pass) => low_pass.target(pixels, ids_masked, [mean, std], PATCH),
        }
    }

    fn loss(&self, pred: &Tensor, target: &Tensor) -> Result<Tensor> {
        match self {
            Self::Pixmim(_) => pixmim::candle::masked_mse_loss(pred, target, true),
            Self::Candle(_) => in_candle::masked_mse_loss(pred, target, true),
        }
    }

    fn attention(&self, qkv: &Tensor) -> Result<Tensor> {
        match self {
            Self::Pixmim(_) => pixmim::candle::attention(qkv, HEADS),
            Self::Candle(_) => in_candle::attention(qkv, HEADS),
        }
    }
}

/// The network, its optimizer, and the time spent in each part of a step.
struct Mae {
    ops: Ops,
    embed: Var,
    /// `(L, D)`.
    positions: Var,
    mask_token: Var,
    /// Of each block: qkv, proj, fc1, fc2.
    blocks: Vec<[Var; 4]>,
    pred: Var,
    moments: Vec<[Tensor; 2]>,
    times: [Duration; 4],
}

const PARTS: [&str; 4] = ["target", "forward and loss", "backward", "update"];

/// A weight of normal numbers, the same for each `seed`.
fn weight(seed: u64, shape: (usize, usize), std: f64) -> Result<Var> {
    let stream = Stream::new(seed, 0, 0, Purpose::Init);
    let values: Vec<f32> =
        (0..(shape.0 * shape.1) as u32).map(|i| (std * stream.normal(i)) as f32).collect();
    Var::from_vec(values, shape, &Device::Cpu)
}

fn linear(inp: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (images, tokens, width) = inp.dims3()?;
    let out = inp.reshape((images * tokens, width))?.matmul(weight)?;
    out.reshape((images, tokens, weight.dim(1)?))
}

fn layer_norm(inp: &Tensor) -> Result<Tensor> {
    let centred = inp.broadcast_sub(&inp.mean_keepdim(D::Minus1)?)?;
    centred.broadcast_div(&(centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?)
}

/// Rows `ids` `(B, n)` of `(B, L, width)`.
fn rows(of: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ids = ids.unsqueeze(2)?.broadcast_as((ids.dim(0)?, ids.dim(1)?, of.dim(2)?))?;
    of.gather(&ids.contiguous()?, 1)
}

impl Mae {
    fn new(ops: Ops) -> Result<Self> {
        let block = |i: usize| -> Result<[Var; 4]> {
            let weight = |j, shape| weight(10 * (i as u64 + 1) + j, shape, 0.05);
            let (hidden, dim) = (4 * DIM, DIM);
            Ok([
                weight(0, (dim, 3 * dim))?,
                weight(1, (dim, dim))?,
                weight(2, (dim, hidden))?,
                weight(3, (hidden, dim))?,
            ])
        };
        let mut mae = Self {
            ops,
            embed: weight(1, (NUMBERS, DIM), 0.05)?,
            positions: weight(2, (PATCHES, DIM), 0.5)?,
            mask_token: weight(3, (1, DIM), 0.02)?,
            blocks: (0..ENCODER_BLOCKS + DECODER_BLOCKS).map(block).collect::<Result<_>>()?,
            pred: weight(4, (DIM, NUMBERS), 0.05)?,
            moments: Vec::new(),
            times: [Duration::ZERO; 4],
        };
        let zeros = |weight: &Var| Ok([weight.zeros_like()?, weight.zeros_like()?]);
        mae.moments = mae.weights().map(zeros).collect::<Result<_>>()?;
        Ok(mae)
    }

    fn weights(&self) -> impl Iterator<Item = &Var> {
        let single = [&self.embed, &self.positions, &self.mask_token, &self.pred];
        single.into_iter().chain(self.blocks.iter().flatten())
    }

    fn block(&self, x: Tensor, [qkv, proj, fc1, fc2]: &[Var; 4]) -> Result<Tensor> {
        let mixed = self.ops.attention(&linear(&layer_norm(&x)?, qkv)?)?;
        let x = (x + linear(&mixed, proj)?)?;
        let hidden = linear(&layer_norm(&x)?, fc1)?.gelu_erf()?;
        x + linear(&hidden, fc2)?
    }

    /// `patches` `(B, L, E)` to what the network makes of the masked ones, `(B, M, E)`.
    fn forward(&self, patches: &Tensor, kept: &Tensor, masked: &Tensor) -> Result<Tensor> {
        let images = patches.dim(0)?;
        let positions = self.positions.broadcast_as((images, PATCHES, DIM))?.contiguous()?;
        let (encoder, decoder) = self.blocks.split_at(ENCODER_BLOCKS);
        let mut x = (linear(&rows(patches, kept)?, &self.embed)? + rows(&positions, kept)?)?;
        for block in encoder {
            x = self.block(x, block)?;
        }
        let unseen = rows(&positions, masked)?.broadcast_add(self.mask_token.as_tensor())?;
        x = Tensor::cat(&[(x + rows(&positions, kept)?)?, unseen], 1)?;
        for block in decoder {
            x = self.block(x, block)?;
        }
        linear(&layer_norm(&x.i((.., KEPT.., ..))?)?, &self.pred)
    }

    /// One step of Adam. Returns the loss before it.
    fn step(&mut self, step: usize, pixels: &Tensor, ids: &Tensor) -> Result<f32> {
        let (kept, masked) = (ids.i((.., ..KEPT))?, ids.i((.., KEPT..))?.contiguous()?);
        let start = Instant::now();
        let target = self.ops.target(pixels, &masked)?;
        let targeted = Instant::now();
        let loss = self.ops.loss(&self.forward(&patchify(pixels)?, &kept, &masked)?, &target)?;
        let value = loss.to_scalar::<f32>()?;
        let forward = Instant::now();
        let grads = loss.backward()?;
        let backward = Instant::now();
        let mut moments = std::mem::take(&mut self.moments);
        for (weight, [first, second]) in zip(self.weights(), &mut moments) {
            let Some(grad) = grads.get(weight) else {
                candle_core::bail!("a weight without gradient")
            };
            *first = ((&*first * 0.9)? + (grad * 0.1)?)?;
            *second = ((&*second * 0.95)? + (grad.sqr()? * 0.05)?)?;
            let corrected =
                |moment: &Tensor, beta: f64| moment / (1.0 - beta.powi(step as i32 + 1));
            let scale = (corrected(second, 0.95)?.sqrt()? + 1e-8)?;
            weight.set(&(weight.as_tensor() - (corrected(first, 0.9)? / scale)? * 1e-3)?)?;
        }
        self.moments = moments;
        let ends = [start, targeted, forward, backward, Instant::now()];
        zip(&mut self.times, ends.windows(2)).for_each(|(time, ends)| *time += ends[1] - ends[0]);
        Ok(value)
    }
}

/// `(B, 3, S, S)` on [0, 1] to `(B, L, E)` on [-1, 1].
fn patchify(pixels: &Tensor) -> Result<Tensor> {
    let (images, grid) = (pixels.dim(0)?, SIDE / PATCH);
    let patches = pixels.reshape(vec![images, 3, grid, PATCH, grid, PATCH])?;
    let patches = patches.permute(vec![0, 2, 4, 3, 5, 1])?.reshape((images, PATCHES, NUMBERS))?;
    patches.affine(2.0, -1.0)
}

/// The bundled photos, `(N, 3, S, S)` on [0, 1].
fn photos() -> std::result::Result<Tensor, Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/photos");
    let source = Source::open(&folder, &Options::default())?;
    let mut photos = Vec::new();
    for sample in 0..source.len() {
        let photo = source.read(sample).map_err(|bad| format!("{bad:?}"))?;
        let (photo, crop) = augment::center(&photo, SIDE, Interpolation::Bicubic);
        let pixels =
            Tensor::from_vec(photo.pixels.to_vec(), (photo.height, photo.width, 3), &Device::Cpu)?;
        let (top, left) = (crop.top as usize, crop.left as usize);
        let pixels = pixels.i((top..top + SIDE, left..left + SIDE))?.permute((2, 0, 1))?;
        photos.push(pixels.to_dtype(DType::F32)?.affine(1.0 / 255.0, 0.0)?);
    }
    Ok(Tensor::stack(&photos, 0)?)
}

/// The patches of each photo in a random order, `(B, L)`: the first are kept, the others masked.
fn shuffled(step: usize) -> Result<Tensor> {
    let order = |photo: usize| {
        let stream = Stream::new(0, step as u32, photo as u64, Purpose::Mask);
        let mut ids: Vec<u32> = (0..PATCHES as u32).collect();
        ids.sort_by_key(|&id| stream.word(id));
        ids
    };
    Tensor::from_vec((0..BATCH).flat_map(order).collect(), (BATCH, PATCHES), &Device::Cpu)
}

#[expect(clippy::print_stdout, reason = "an example shows what it does")]
fn main() -> std::result::Result<(), Box<dyn Error>> {
    let photos = photos()?;
    let filter = Filter::new(&pixmim::Device::cpu(), SIDE, RADIUS)?;
    let mut ours = Mae::new(Ops::Pixmim(Box::new(filter)))?;
    let mut theirs = Mae::new(Ops::Candle(LowPass::new(SIDE, RADIUS, DType::F32)?))?;
    println!("step  loss with pixmim::candle  loss in candle's ops");
    let mut apart = 0.0f32;
    for step in 0..STEPS {
        let pixels =
            photos.narrow(0, step % (photos.dim(0)? / BATCH) * BATCH, BATCH)?.contiguous()?;
        let ids = shuffled(step)?;
        if step == 1 {
            // The first step of each warmed up.
            (ours.times, theirs.times) = Default::default();
        }
        let losses = [ours.step(step, &pixels, &ids)?, theirs.step(step, &pixels, &ids)?];
        apart = apart.max((losses[0] - losses[1]).abs() / losses[1]);
        if step % 8 == 0 || step + 1 == STEPS {
            println!("{step:4}  {:24.6}  {:20.6}", losses[0], losses[1]);
        }
    }
    println!("the losses differ by at most {apart:.1e} of their value\n");
    println!("milliseconds a step  pixmim::candle  candle");
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3 / (STEPS - 1) as f64;
    for (part, (ours, theirs)) in zip(PARTS, zip(ours.times, theirs.times)) {
        println!("{part:19}  {:14.2}  {:6.2}", milliseconds(ours), milliseconds(theirs));
    }
    let [ours, theirs] = [ours.times, theirs.times].map(|times| milliseconds(times.iter().sum()));
    println!("{:19}  {ours:14.2}  {theirs:6.2}", "all");
    Ok(())
}
