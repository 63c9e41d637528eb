//! A training loop of your own: the step driven by hand, on images made in memory.

use pixmim::model::MaeConfig;
use pixmim::train::step::{MicroBatch, Settings, Trainer};
use pixmim::{DType, Device, Result};

const IMAGES: usize = 32;
const SIDE: usize = 32;
#[expect(clippy::print_stdout, reason = "an example shows what it does")]
fn main() -> Result<()> {
    let config = MaeConfig {
        image_size: SIDE,
        patch_size: 4,
        dim: 96,
        depth: 2,
        decoder_dim: 48,
        decoder_depth: 1,
        ..MaeConfig::VIT_BASE_PATCH16
    };
    let settings = Settings {
        micro_batch: IMAGES,
        radius: Some(6.0), // the low-pass target of PixMIM; None is MAE
        norm_pix: true,
        kept: 16, // of 64 patches
        mask_block: 1,
        mean: [0.5; 3],
        std: [0.25; 3],
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.05,
        decay_tokens: false,
        clip: 0.0,
        seed: 0,
        record: true,
    };
    let mut trainer = Trainer::new(Device::cpu(), config, DType::F32, settings)?;
    // Image i is a wave of a direction and length of its own; bytes of any RGB images will do.
    let byte = |at: usize| {
        let (i, y, x) = (at / 3 / SIDE / SIDE, at / 3 / SIDE % SIDE, at / 3 % SIDE);
        let phase = 0.05 * ((i % 6) * x + (i / 6) * y) as f64;
        (127.5 + 100.0 * phase.sin()) as u8
    };
    let images: Vec<u8> = (0..IMAGES * SIDE * SIDE * 3).map(byte).collect();
    // Where an image starts, its height and width, top and left of the crop, whether it is mirrored.
    let place = |i: i64| [i * 32 * 32 * 3, 32, 32, 0, 0, 0];
    let geometry: Vec<i64> = (0..IMAGES as i64).flat_map(place).collect();
    let samples: Vec<i64> = (0..IMAGES as i64).collect();

    for epoch in 0..=100 {
        trainer.clear()?;
        // A new epoch draws new masks. A step of several micro-batches calls `accumulate` for each.
        let batch = MicroBatch { images: &images, geometry: &geometry, samples: &samples, epoch };
        trainer.accumulate(batch, 1)?;
        let outcome = trainer.update(2e-3)?;
        if epoch % 20 == 0 {
            println!("step {epoch:3}  loss {:.4}  |g| {:.3}", outcome.loss, outcome.grad_norm);
        }
    }
    Ok(())
}
