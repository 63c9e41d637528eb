//! What a model is made of, as C sees it.

use std::ffi::{CStr, c_char};
use std::path::Path;

use pixmim_core::model::MaeConfig;
use pixmim_core::train::checkpoint::{Checkpoint, TensorFile};
use pixmim_core::train::config::{Auto, Config, Crop, Target};
use pixmim_core::{DType, Device, Error};

use crate::call::{flag, size};
use crate::status::{Failure, Outcome, PIXMIM_CORRUPT, PIXMIM_DTYPE, guard, pixmim_status};
use crate::tensor::{PIXMIM_F32, dtype, expect_struct, pointee, pointee_mut};

/// Network and training step. Fill it with pixmim_model_config_preset, then change what is to be otherwise.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct pixmim_model_config {
    /// sizeof(pixmim_model_config).
    pub struct_size: u32,
    /// Of activations: PIXMIM_F32, PIXMIM_BF16 on a GPU (weights, moments and gradients are f32), PIXMIM_F64 on the CPU.
    pub dtype: i32,
    /// Side of the square input, in pixels (S).
    pub image_size: i64,
    /// Side of a patch, in pixels (P); divides image_size.
    pub patch_size: i64,
    /// Width of the encoder; divisible by 4 and by heads.
    pub dim: i64,
    /// Transformer blocks of the encoder.
    pub depth: i64,
    /// Attention heads of the encoder.
    pub heads: i64,
    /// Width of the decoder; divisible by 4 and by decoder_heads.
    pub decoder_dim: i64,
    /// Transformer blocks of the decoder.
    pub decoder_depth: i64,
    /// Attention heads of the decoder.
    pub decoder_heads: i64,
    /// Width of the MLPs over the width of the tokens.
    pub mlp_ratio: i64,
    /// Images of each call (B).
    pub micro_batch: i64,
    /// Side of the blocks of patches that are masked together; 1: each patch by itself.
    pub mask_block: i64,
    /// Seed of weights and masks, below 2^63.
    pub seed: u64,
    /// Share of the patches that are masked: K = (int) (L (1 - mask_ratio)) are kept.
    pub mask_ratio: f64,
    /// PixMIM: radius of the target's low-pass filter, 40 at 224 pixels. MAE, whose target is the image itself: 0 or less.
    pub radius: f64,
    /// Mean of the colours, RGB on [0, 1].
    pub mean: [f64; 3],
    /// Standard deviation of the colours.
    pub std: [f64; 3],
    /// Decay rates of Adam's moments.
    pub betas: [f64; 2],
    /// Adam's epsilon.
    pub eps: f64,
    /// Decoupled weight decay of AdamW; biases and norms never decay.
    pub weight_decay: f64,
    /// Largest gradient norm; 0: no clipping.
    pub clip: f64,
    /// 1: each target patch is normalised by its own mean and variance.
    pub norm_pix: i32,
    /// 1: class and mask token decay too.
    pub decay_tokens: i32,
    /// On a GPU, 1: a step's work is recorded once and then enqueued as a whole, which changes no bit. Not for the legacy
    /// default stream, nor for a stream that the caller captures: 0.
    pub record: i32,
    /// 0.
    pub reserved: i32,
}

/// The text behind a pointer.
///
/// # Safety
/// `text` is null or ended by a zero byte.
pub(super) unsafe fn utf8<'a>(name: &str, text: *const c_char) -> Outcome<&'a str> {
    // SAFETY: promised by the caller; a byte is never misaligned.
    unsafe { pointee(name, text) }?;
    // SAFETY: not null, and ended by a zero byte as the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Failure::invalid(name, "is not UTF-8"))
}

impl pixmim_model_config {
    /// The config behind a pointer, of this version.
    ///
    /// # Safety
    /// `config` is null, misaligned, or leads to a config.
    pub(super) unsafe fn read<'a>(config: *const Self) -> Outcome<&'a Self> {
        // SAFETY: promised by the caller.
        let config = unsafe { pointee("config", config) }?;
        expect_struct("config", config.struct_size, size_of::<Self>())?;
        Ok(config)
    }

    /// As [`read`](Self::read), writable.
    ///
    /// # Safety
    /// As for [`read`](Self::read), and nobody else uses it.
    unsafe fn write<'a>(config: *mut Self) -> Outcome<&'a mut Self> {
        // SAFETY: promised by the caller.
        let config = unsafe { pointee_mut("config", config) }?;
        expect_struct("config", config.struct_size, size_of::<Self>())?;
        Ok(config)
    }

    /// The same as a run's config, whose checks are the model's.
    pub(super) fn to_run(self) -> Outcome<Config> {
        let mut config = Config::preset("base")?;
        config.model = MaeConfig {
            image_size: size("image_size", self.image_size)?,
            patch_size: size("patch_size", self.patch_size)?,
            dim: size("dim", self.dim)?,
            depth: size("depth", self.depth)?,
            heads: size("heads", self.heads)?,
            decoder_dim: size("decoder_dim", self.decoder_dim)?,
            decoder_depth: size("decoder_depth", self.decoder_depth)?,
            decoder_heads: size("decoder_heads", self.decoder_heads)?,
            mlp_ratio: size("mlp_ratio", self.mlp_ratio)?,
        };
        // A crop is the caller's; to those who read the weights the target's own is told.
        (config.method.target, config.method.crop) = match self.radius > 0.0 {
            true => (Target::LowFreq, Crop::Simple),
            false => (Target::Raw, Crop::RandomResized),
        };
        // MAE has none; what is not a number is no radius either, and is refused.
        config.method.radius = Auto::Value(if self.radius <= 0.0 { 1.0 } else { self.radius });
        config.method.norm_pix = flag("norm_pix", self.norm_pix)?;
        config.method.mask_ratio = self.mask_ratio;
        config.method.mask_block = size("mask_block", self.mask_block)?;
        (config.data.mean, config.data.std) = (self.mean, self.std);
        config.optim.micro_batch = size("micro_batch", self.micro_batch)?;
        config.optim.global_batch = config.optim.micro_batch.max(1);
        (config.optim.betas, config.optim.eps) = (self.betas, self.eps);
        (config.optim.weight_decay, config.optim.clip_grad) = (self.weight_decay, self.clip);
        if !(0.0..=f64::from(f32::MAX)).contains(&self.clip) {
            let why = format!("is {:?}; it is 0 for none, or more, and finite", self.clip);
            return Err(Failure::invalid("clip", why));
        }
        config.optim.decay_tokens = flag("decay_tokens", self.decay_tokens)?;
        config.runtime.seed = self.seed;
        Ok(config)
    }

    /// Takes over what a run's config says of network and step.
    fn follow(&mut self, config: &Config) {
        let Config { model, method, data, optim, .. } = config;
        *self = Self {
            image_size: model.image_size as i64,
            patch_size: model.patch_size as i64,
            dim: model.dim as i64,
            depth: model.depth as i64,
            heads: model.heads as i64,
            decoder_dim: model.decoder_dim as i64,
            decoder_depth: model.decoder_depth as i64,
            decoder_heads: model.decoder_heads as i64,
            mlp_ratio: model.mlp_ratio as i64,
            micro_batch: optim.micro_batch as i64,
            mask_block: method.mask_block as i64,
            seed: config.runtime.seed,
            mask_ratio: method.mask_ratio,
            radius: match method.target {
                Target::LowFreq => config.resolved().radius,
                Target::Raw => 0.0,
            },
            mean: data.mean,
            std: data.std,
            betas: optim.betas,
            eps: optim.eps,
            weight_decay: optim.weight_decay,
            clip: optim.clip_grad,
            norm_pix: method.norm_pix.into(),
            decay_tokens: optim.decay_tokens.into(),
            ..*self
        };
    }

    /// The dtype of activations, if the device has it.
    pub(super) fn dtype_on(&self, dev: &Device) -> Outcome<DType> {
        let allowed = match dev {
            Device::Cuda(_) => [DType::F32, DType::Bf16],
            _ => [DType::F32, DType::F64],
        };
        dtype(self.dtype).filter(|dtype| allowed.contains(dtype)).ok_or_else(|| {
            let why = format!("`dtype` is {}; here it is one of {allowed:?}", self.dtype);
            Failure::new(PIXMIM_DTYPE, why)
        })
    }

    /// Whether work is recorded.
    pub(super) fn records(&self) -> Outcome<bool> {
        if self.reserved != 0 {
            return Err(Failure::invalid("reserved", "is not 0"));
        }
        flag("record", self.record)
    }
}

/// Weights on disk.
pub(super) enum Saved {
    /// A folder as training writes it.
    Checkpoint(Box<Checkpoint>),
    /// A safetensors file.
    File(TensorFile),
}

impl Saved {
    /// # Safety
    /// `path` is null or ended by a zero byte.
    pub(super) unsafe fn open(path: *const c_char) -> Outcome<Self> {
        // SAFETY: promised by the caller.
        let path = Path::new(unsafe { utf8("path", path) }?);
        let opened = match path.is_dir() {
            true => Checkpoint::open(path).map(|found| Self::Checkpoint(Box::new(found))),
            false => TensorFile::open(path).map(Self::File),
        };
        opened.map_err(of_file)
    }

    fn weights(&self) -> &TensorFile {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.model(),
            Self::File(file) => file,
        }
    }
}

/// What is wrong with a file, where a run would blame its config.
pub(super) fn of_file(error: Error) -> Failure {
    match error {
        Error::Config(_) => Failure::new(PIXMIM_CORRUPT, error.to_string()),
        other => other.into(),
    }
}

/// Fills in a config, whose struct_size is set, from a preset: "demo", "tiny", "small", "base", "large", "huge" or
/// "pixmim-vit-b-300e", which are ViTs of these sizes with PixMIM's target; dtype is f32.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_config_preset(
    name: *const c_char,
    config: *mut pixmim_model_config,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it leads to a config, which nobody else uses.
        let config = unsafe { pixmim_model_config::write(config) }?;
        // SAFETY: the header asks of the caller that texts are ended by a zero byte.
        let preset = Config::preset(unsafe { utf8("name", name) }?)?;
        config.follow(&preset);
        (config.dtype, config.record, config.reserved) = (PIXMIM_F32, 0, 0);
        Ok(())
    })
}

/// Overwrites in a filled config what weights on disk tell, the paths being as for pixmim_model_load: the network's sizes,
/// and, unless others than pixmim wrote them, heads, target and colours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_config_load(
    path: *const c_char,
    config: *mut pixmim_model_config,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it leads to a config, which nobody else uses.
        let config = unsafe { pixmim_model_config::write(config) }?;
        // SAFETY: the header asks of the caller that texts are ended by a zero byte.
        let saved = unsafe { Saved::open(path) }?;
        let mut run = config.to_run()?;
        run.follow(saved.weights()).map_err(of_file)?;
        config.follow(&run);
        Ok(())
    })
}
