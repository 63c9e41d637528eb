//! The configuration of a run: its keys, the presets, and what follows from the values.
//!
//! A [`Config`] is read in layers ([`Layers`]), each laid over the one before; [`KEYS`] says what each
//! key takes and means, and [`Config::check`] judges the values together.

mod check;
mod keys;
mod parse;
mod write;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::model::MaeConfig;
use crate::ops::random_masking;
pub use crate::ops::resize::Interpolation;

pub use keys::{Bounds, KEYS, Key, Kind};
pub use parse::{Assignment, Layers};
pub use write::reference;

/// Name and text of each preset: the files in `configs/`.
pub const PRESETS: [(&str, &str); 7] = [
    ("demo", include_str!("../../../configs/demo.toml")),
    ("tiny", include_str!("../../../configs/tiny.toml")),
    ("small", include_str!("../../../configs/small.toml")),
    ("base", include_str!("../../../configs/base.toml")),
    ("large", include_str!("../../../configs/large.toml")),
    ("huge", include_str!("../../../configs/huge.toml")),
    ("pixmim-vit-b-300e", include_str!("../../../configs/pixmim-vit-b-300e.toml")),
];

/// Names of the methods, each a group of switches that [`Layers::method`] sets together.
pub const METHODS: [&str; 2] = ["pixmim", "mae"];

/// Everything that decides what a run computes, and where. As a file it is TOML; each key is in
/// `docs/config.md`. Presets are in `configs/`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Sizes of the network.
    pub model: MaeConfig,
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
    /// Radius of the low-pass filter, in cycles per image; `"auto"` is the paper's 40 at 224, scaled
    /// with `image_size`.
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
    pub mean: [f64; 3],
    /// Standard deviation of the colours.
    pub std: [f64; 3],
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
    /// `auto`, `cpu`, `cuda` or `simt`.
    pub device: String,
    /// `auto`, `f32` or `bf16`: precision of matrix products; sums, weights and statistics are
    /// always f32.
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
    /// Folder of the run; empty: the program picks a new one.
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

/// A number of updates, or of passes over the data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Passes over the data.
    Epochs(f64),
    /// Updates of the weights.
    Steps(u64),
}

impl Length {
    /// Reads `40ep` or `1000it`; none for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(epochs) = text.strip_suffix("ep") {
            let epochs = epochs.parse().ok()?;
            (0.0..=keys::EPOCHS_MAX).contains(&epochs).then_some(Self::Epochs(epochs))
        } else {
            let steps = text.strip_suffix("it")?.parse().ok()?;
            (steps <= keys::STEPS_MAX).then_some(Self::Steps(steps))
        }
    }

    /// The length in updates, rounded.
    #[must_use]
    pub fn steps(self, steps_per_epoch: u64) -> u64 {
        match self {
            Self::Epochs(epochs) => (epochs * steps_per_epoch as f64).round() as u64,
            Self::Steps(steps) => steps,
        }
    }
}

/// What the values left to the program (`"auto"`) come to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resolved {
    /// Radius of the low-pass filter, in cycles per image.
    pub radius: f64,
    /// Reflected border of the simple crop, in pixels.
    pub padding: usize,
    /// Threads that decode.
    pub data_threads: usize,
    /// Threads that compute.
    pub compute_threads: usize,
}

impl<T: Copy> Auto<T> {
    fn unwrap_or_else(self, auto: impl FnOnce() -> T) -> T {
        match self {
            Self::Value(value) => value,
            Self::Auto(_) => auto(),
        }
    }
}

impl Config {
    /// A preset as it stands, with method PixMIM.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for an unknown name.
    pub fn preset(name: &str) -> Result<Self> {
        let mut layers = Layers::new();
        layers.preset(name)?;
        layers.finish()
    }

    /// Reads a complete config, such as the `config.toml` of a run. `place` names it in errors.
    ///
    /// # Errors
    /// [`crate::Error::Config`] with line and column for what cannot be used, and for missing keys.
    pub fn parse(place: &str, text: &str) -> Result<Self> {
        let mut layers = Layers::new();
        layers.toml(place, text)?;
        layers.finish()
    }

    /// Reads a complete config from a file of at most 1 MiB.
    ///
    /// # Errors
    /// As [`Config::parse`], and when the file cannot be read.
    pub fn load(path: &Path) -> Result<Self> {
        let mut layers = Layers::new();
        layers.file(path)?;
        layers.finish()
    }

    /// The config as TOML with a comment on each key. [`Config::parse`] gives back an equal config.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if a value has no form in TOML: a path that is not UTF-8, a seed over 2^63 - 1.
    pub fn to_toml(&self) -> Result<String> {
        write::to_toml(self)
    }

    /// What each `"auto"` comes to on this machine.
    ///
    /// The radius is the paper's 40 at 224, scaled with the side of the image: 0.179 cycles per pixel.
    /// The padding is the paper's 4 pixels, scaled likewise below 224 but at least 1.
    #[must_use]
    pub fn resolved(&self) -> Resolved {
        let scale = self.model.image_size as f64 / 224.0;
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Resolved {
            radius: self.method.radius.unwrap_or_else(|| 40.0 * scale),
            padding: self
                .method
                .padding
                .unwrap_or_else(|| ((4.0 * scale).round() as usize).clamp(1, 4)),
            data_threads: self.data.threads.unwrap_or_else(|| (cores() - 1).max(1)),
            compute_threads: self.runtime.threads.unwrap_or_else(cores),
        }
    }

    /// Patches of an image.
    #[must_use]
    pub fn patches(&self) -> usize {
        self.model.patches()
    }

    /// Patches of an image that the encoder sees: `int(patches * (1 - mask_ratio))`, as MAE's
    /// `random_masking` has it.
    #[must_use]
    pub fn kept_patches(&self) -> usize {
        random_masking::kept(self.patches(), self.method.mask_ratio)
    }

    /// Peak learning rate: `optim.lr`, or `optim.base_lr * global_batch / 256`. NaN if neither is
    /// given, which [`Config::check`] refuses.
    #[must_use]
    pub fn peak_lr(&self) -> f64 {
        let scaled = || Some(self.optim.base_lr? * self.optim.global_batch as f64 / 256.0);
        self.optim.lr.or_else(scaled).unwrap_or(f64::NAN)
    }

    /// Updates of the linear warm-up. They may be more than [`Config::total_steps`]: then the run ends
    /// before the peak. 0 if `schedule.warmup` is not a length, which [`Config::check`] refuses.
    #[must_use]
    pub fn warmup_steps(&self, steps_per_epoch: u64) -> u64 {
        Length::parse(&self.schedule.warmup).map_or(0, |length| length.steps(steps_per_epoch))
    }

    /// Updates of the whole run, at least 1. 0 if no length is given, which [`Config::check`] refuses.
    #[must_use]
    pub fn total_steps(&self, steps_per_epoch: u64) -> u64 {
        let epochs = self.schedule.epochs.map(Length::Epochs);
        let length = self.schedule.steps.map(Length::Steps).or(epochs);
        length.map_or(0, |length| length.steps(steps_per_epoch).max(1))
    }

    /// The method whose target and crop these are: `pixmim`, `mae`, or `custom` for another mixture.
    #[must_use]
    pub fn method_name(&self) -> &'static str {
        match (self.method.target, self.method.crop) {
            (Target::LowFreq, Crop::Simple) => "pixmim",
            (Target::Raw, Crop::RandomResized) => "mae",
            _ => "custom",
        }
    }
}
