//! The training steps whose speed is measured, and the devices, for this example and for `benches/`.

use pixmim::model::MaeConfig;
use pixmim::ops::random_masking;
use pixmim::rng::{Purpose, Stream};
use pixmim::train::step::{MicroBatch, Outcome, Settings, Trainer};
use pixmim::{Cpu, DType, Device, Error, Gpu, Products, Result};

/// A network and its micro-batch.
#[derive(Clone, Copy)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) config: MaeConfig,
    pub(crate) images: usize,
    /// Side of the blocks of patches that are masked together.
    pub(crate) mask_block: usize,
}

/// Image 32, patch 8, encoder 64 x 2 x 2, decoder 48 x 2 x 3, batch 2: as much as the host executor runs in no time.
pub(crate) const TINY: Workload = Workload {
    name: "tiny",
    config: MaeConfig {
        image_size: 32,
        patch_size: 8,
        dim: 64,
        depth: 2,
        heads: 2,
        decoder_dim: 48,
        decoder_depth: 2,
        decoder_heads: 3,
        mlp_ratio: 2,
    },
    images: 2,
    mask_block: 1,
};

/// Image 64, patch 8, encoder 192 x 6 x 3, decoder 96 x 2 x 3, batch 64: the preset `demo`.
pub(crate) const SMALL64: Workload = Workload {
    name: "small64",
    config: MaeConfig {
        image_size: 64,
        patch_size: 8,
        dim: 192,
        depth: 6,
        heads: 3,
        decoder_dim: 96,
        decoder_depth: 2,
        decoder_heads: 3,
        mlp_ratio: 4,
    },
    images: 64,
    mask_block: 1,
};

/// ViT-B/16 at 224, decoder 512 x 8 x 16, batch 8.
pub(crate) const VIT_B: Workload = vit("vit_b", MaeConfig::VIT_BASE_PATCH16);
/// ViT-L/16 at 224, decoder 512 x 8 x 16, batch 8.
pub(crate) const VIT_L: Workload = vit("vit_l", MaeConfig::VIT_LARGE_PATCH16);
/// ViT-H/14 at 224, decoder 512 x 8 x 16, batch 8.
pub(crate) const VIT_H: Workload = vit("vit_h", MaeConfig::VIT_HUGE_PATCH14);
/// LSMAE: ViT-B/16 at 448, which are four times the patches, masked in blocks of 2 x 2, batch 8.
pub(crate) const LSMAE: Workload = Workload {
    mask_block: 2,
    ..vit("lsmae", MaeConfig { image_size: 448, ..MaeConfig::VIT_BASE_PATCH16 })
};

const fn vit(name: &'static str, config: MaeConfig) -> Workload {
    Workload { name, config, images: 8, mask_block: 1 }
}

/// Mean and standard deviation of ImageNet's colours.
pub(crate) const MEAN_STD: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

impl Workload {
    /// Patches of an image that the encoder sees.
    pub(crate) fn kept(&self) -> usize {
        random_masking::kept(self.config.patches(), 0.75)
    }

    /// PixMIM's radius of 40 at 224, at the same cycles per pixel.
    pub(crate) fn radius(&self) -> f64 {
        40.0 * self.config.image_size as f64 / 224.0
    }

    pub(crate) fn trainer(&self, dev: &Device, dtype: DType) -> Result<Trainer> {
        let settings = Settings {
            micro_batch: self.images,
            radius: Some(self.radius()),
            norm_pix: true,
            kept: self.kept(),
            mask_block: self.mask_block,
            resize: None,
            mean: MEAN_STD.0,
            std: MEAN_STD.1,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.05,
            decay_tokens: false,
            clip: 0.0,
            seed: 0,
            record: true,
        };
        Trainer::new(dev.clone(), self.config, dtype, settings)
    }

    /// The same on a GPU, with the largest micro-batch from `most` down by halves that fits into its memory.
    pub(crate) fn fitting(
        &self,
        most: usize,
        dev: &Device,
        dtype: DType,
    ) -> Result<(Self, Trainer)> {
        let workload = Self { images: most, ..*self };
        match workload.trainer(dev, dtype) {
            Err(Error::Invalid { .. }) if most > 1 => self.fitting(most / 2, dev, dtype),
            made => Ok((workload, made?)),
        }
    }
}

/// Precision of a step: that of matrix products on the CPU, that of activations on a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Precision {
    F32,
    Bf16,
}

impl Precision {
    /// The device as it computes in this precision, and what its tensors hold.
    pub(crate) fn on(self, dev: &Device) -> (Device, DType) {
        match (dev, self) {
            (Device::Cuda(_), Self::Bf16) => (dev.clone(), DType::Bf16),
            (Device::Cuda(_), Self::F32) => (dev.clone(), DType::F32),
            (_, Self::Bf16) => (Device::Cpu(Cpu { products: Products::Bf16 }), DType::F32),
            (_, Self::F32) => (Device::cpu(), DType::F32),
        }
    }
}

/// The device of this name: cpu, cuda, simt (the host executor), or auto, which is a GPU where there is one.
pub(crate) fn device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::cpu()),
        "cuda" => Gpu::nvidia(0).map(Device::Cuda),
        #[cfg(pixmim_simt)]
        "simt" => Gpu::simt(pixmim::cuda::SimtOptions::default()).map(Device::Cuda),
        "auto" => match Gpu::nvidia(0) {
            Err(Error::NoDevice { .. }) => Ok(Device::cpu()),
            gpu => gpu.map(Device::Cuda),
        },
        _ => Err(Error::invalid("device", format!("is {name}; choose auto, cpu, cuda or simt"))),
    }
}

/// A batch of random images in memory, every other one mirrored.
pub(crate) struct Images {
    pub(crate) pixels: Vec<u8>,
    pub(crate) geometry: Vec<i64>,
    pub(crate) samples: Vec<i64>,
}

impl Images {
    pub(crate) fn new(workload: &Workload) -> Self {
        let (side, images) = (workload.config.image_size, workload.images);
        let bytes = side * side * 3;
        let noise = Stream::new(1, 0, 0, Purpose::Augment);
        // A thousand large images repeat themselves; to draw them all would take seconds.
        let noise: Vec<u8> = (0..1 << 20).map(|i| noise.word(i) as u8).collect();
        Self {
            pixels: noise.into_iter().cycle().take(images * bytes).collect(),
            geometry: (0..images)
                .flat_map(|i| [(i * bytes) as i64, side as i64, side as i64, 0, 0, (i % 2) as i64])
                .collect(),
            samples: (0..images as i64).collect(),
        }
    }
}

/// Input, low-pass target, masking, forward, loss, backward, AdamW: `micro_batches` times the images.
pub(crate) fn step(
    trainer: &mut Trainer,
    images: &Images,
    micro_batches: usize,
    epoch: u32,
) -> Result<Outcome> {
    let Images { pixels, geometry, samples } = images;
    trainer.clear()?;
    for _ in 0..micro_batches {
        trainer
            .accumulate(MicroBatch { images: pixels, geometry, samples, epoch }, micro_batches)?;
    }
    trainer.update(1e-4)
}
