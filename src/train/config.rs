//! The configuration of a run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything that decides what a run computes, and where. As a file it is TOML; each key is in
/// `docs/config.md`. Presets are in `configs/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Sizes of the network.
    pub model: Model,
    /// What is learned: target, masking, crops.
    pub method: Method,
    /// Where images come from.
    pub data: Data,
    /// The optimizer.
    pub optim: Optim,
    /// How long, and how the learning rate moves.
    pub schedule: Schedule,
    /// Where and how it computes.
    pub runtime: Runtime,
    /// What it writes, and how often.
    pub log: Log,
}

/// Sizes of the masked autoencoder (method: He et al. 2021, arXiv:2111.06377).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Side of the square input, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels; divides `image_size`.
    pub patch_size: usize,
    /// Width of the encoder; divisible by 4 and by `heads`.
    pub dim: usize,
    /// Transformer blocks of the encoder.
    pub depth: usize,
    /// Attention heads of the encoder.
    pub heads: usize,
    /// Width of the decoder; divisible by 4 and by `decoder_heads`.
    pub decoder_dim: usize,
    /// Transformer blocks of the decoder.
    pub decoder_depth: usize,
    /// Attention heads of the decoder.
    pub decoder_heads: usize,
    /// Width of the MLPs over the width of the tokens.
    pub mlp_ratio: usize,
}

/// What the reconstruction target is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The low-pass filtered image (PixMIM).
    LowFreq,
    /// The image itself (MAE).
    Raw,
}

/// How an image becomes a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Crop {
    /// Resize the short side to `image_size`, pad by reflection, crop (PixMIM's Simple Resized Crop).
    Simple,
    /// Crop a random part of 20 % to 100 % of the area, resize it (MAE's Random Resized Crop).
    RandomResized,
}

/// Interpolation of resizing, both as Pillow does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Cubic, a = -0.5, antialiased.
    Bicubic,
    /// Linear, antialiased.
    Bilinear,
}

/// A value that may be left to the program: `"auto"`, or the value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Auto<T> {
    /// A value of one's own.
    Value(T),
    /// `"auto"`.
    Auto(AutoWord),
}

/// The word `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AutoWord {
    /// The word `auto`.
    Auto,
}

/// What is learned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Method {
    /// The reconstruction target.
    pub target: Target,
    /// Radius of the low-pass filter, in cycles per image; `"auto"` is the paper's 40 at 224, scaled to `image_size`.
    pub radius: Auto<f64>,
    /// How an image becomes a square.
    pub crop: Crop,
    /// Reflected border of the simple crop, in pixels; `"auto"` is the paper's 4 at 224 or more, less below.
    pub padding: Auto<usize>,
    /// Smallest and largest share of the area that the random resized crop keeps.
    pub crop_scale: [f64; 2],
    /// Interpolation of resizing.
    pub interpolation: Interpolation,
    /// Probability of a horizontal flip.
    pub flip: f64,
    /// Whether each target patch is normalised by its own mean and variance.
    pub norm_pix: bool,
    /// Share of the patches that are masked.
    pub mask_ratio: f64,
    /// Side of the blocks of patches that are masked together (1: single patches; 2: LSMAE).
    pub mask_block: usize,
}

/// Where images come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// A folder tree of JPEG, PNG and WebP files, or of CIFAR-10 binary batches.
    pub path: PathBuf,
    /// Mean of the colours, RGB on [0, 1].
    pub mean: [f32; 3],
    /// Standard deviation of the colours.
    pub std: [f32; 3],
    /// Threads that decode; `"auto"`: one less than the cores, at least one.
    pub threads: Auto<usize>,
    /// Micro-batches decoded ahead.
    pub prefetch: usize,
    /// Resized images kept in memory, in MiB.
    pub cache_mib: usize,
    /// Training stops when more than this share of the images cannot be read.
    pub max_bad_share: f64,
    /// Largest image file, in MiB.
    pub max_file_mib: usize,
    /// Longest side of an image, in pixels.
    pub max_side: usize,
    /// Most pixels of an image, in units of 2^20.
    pub max_mebipixels: usize,
    /// Turn images as their EXIF orientation says (off: as `ImageFolder` of torchvision has it).
    pub exif_orientation: bool,
}

/// The optimizer: AdamW with decoupled weight decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// Images per update of the weights.
    pub global_batch: usize,
    /// Images in memory at once; divides `global_batch`.
    pub micro_batch: usize,
    /// Peak learning rate per 256 images of `global_batch`. Give this or `lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_lr: Option<f64>,
    /// Peak learning rate. Give this or `base_lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether `cls_token` and `mask_token` decay too (MAE: yes; PixMIM: no).
    pub decay_tokens: bool,
    /// Decay rates of Adam's moments.
    pub betas: [f64; 2],
    /// Adam's epsilon.
    pub eps: f64,
    /// Largest gradient norm; 0: no clipping.
    pub clip_grad: f64,
    /// Training stops after this many non-finite steps in a row.
    pub max_skipped: u32,
}

/// How long, and how the learning rate moves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Passes over the data. Give this or `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Updates of the weights. Give this or `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Length of the linear warm-up: `"40ep"` or `"1000it"`.
    pub warmup: String,
    /// Learning rate at the end of the cosine.
    pub min_lr: f64,
}

/// Where and how it computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// `auto`, `cpu` or `cuda`.
    pub device: String,
    /// `auto`, `f32` or `bf16`: precision of matrix products; sums, weights and statistics are always f32.
    pub precision: String,
    /// Threads that compute; `"auto"`: all cores.
    pub threads: Auto<usize>,
    /// Seed of every random choice.
    pub seed: u64,
}

/// What it writes, and how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Folder of the run; empty: `runs/<date>_<time>_<preset>_<method>`.
    pub out: PathBuf,
    /// Steps between logged lines.
    pub every: u64,
    /// Steps between pictures; 0: only at the start and the end.
    pub picture_every: u64,
    /// Images in a picture.
    pub picture_images: usize,
    /// Steps between checkpoints; 0: only at the end.
    pub checkpoint_every: u64,
    /// Checkpoints kept; older ones are deleted once a newer one is safe.
    pub keep_last: usize,
}
