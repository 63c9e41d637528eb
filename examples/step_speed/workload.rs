//! The two training steps whose speed is measured, by this example and by `benches/`.

use pixmim::model::MaeConfig;
use pixmim::ops::random_masking;
use pixmim::rng::{Purpose, Stream};
use pixmim::train::step::{MicroBatch, Outcome, Settings, Trainer};
use pixmim::{Cpu, DType, Device, Products, Result};

/// A network and its batch.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) config: MaeConfig,
    pub(crate) images: usize,
}

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
};
/// ViT-B/16 at 224, decoder 512 x 8 x 16, batch 8.
pub(crate) const VIT_B: Workload =
    Workload { name: "vit_b", config: MaeConfig::VIT_BASE_PATCH16, images: 8 };

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

    pub(crate) fn trainer(&self, products: Products) -> Result<Trainer> {
        let settings = Settings {
            micro_batch: self.images,
            radius: Some(self.radius()),
            norm_pix: true,
            kept: self.kept(),
            mask_block: 1,
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
        Trainer::new(Device::Cpu(Cpu { products }), self.config, DType::F32, settings)
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
        Self {
            pixels: (0..images * bytes).map(|i| noise.word(i as u32) as u8).collect(),
            geometry: (0..images)
                .flat_map(|i| [(i * bytes) as i64, side as i64, side as i64, 0, 0, (i % 2) as i64])
                .collect(),
            samples: (0..images as i64).collect(),
        }
    }
}

/// Input, low-pass target, masking, forward, loss, backward, AdamW.
pub(crate) fn step(trainer: &mut Trainer, images: &Images, epoch: u32) -> Result<Outcome> {
    let Images { pixels, geometry, samples } = images;
    trainer.clear()?;
    trainer.accumulate(MicroBatch { images: pixels, geometry, samples, epoch }, 1)?;
    trainer.update(1e-4)
}
