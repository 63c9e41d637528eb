//! A training loop of your own: your data, crops, learning rates and batches; this crate's network and step.

use pixmim::model::MaeConfig;
use pixmim::train::step::{MicroBatch, Settings, Trainer};
use pixmim::{DType, Device, Result};

const SIZE: [usize; 2] = [36, 48]; // height and width of a photo
const BATCH: i64 = 16; // photos of a micro-batch, of which a step has two

/// Stands for your reader: photo `i` as RGB bytes, a wave of its own direction and length.
fn photo(i: usize) -> Vec<u8> {
    let pixels = (0..SIZE[0] * SIZE[1]).map(|at| (at / SIZE[1] * (i / 6), at % SIZE[1] * (i % 6)));
    let bytes = pixels.map(|(y, x)| (127.5 + 100.0 * (0.05 * (x + y) as f64).sin()) as u8);
    bytes.flat_map(|byte| [byte; 3]).collect()
}

#[expect(clippy::print_stdout, reason = "an example shows what it does")]
fn main() -> Result<()> {
    let config = MaeConfig { image_size: 32, patch_size: 4, ..MaeConfig::VIT_BASE_PATCH16 };
    let config = MaeConfig { dim: 96, depth: 2, decoder_dim: 48, decoder_depth: 1, ..config };
    let settings = Settings {
        micro_batch: BATCH as usize,
        radius: Some(6.0), // the low-pass target of PixMIM; None is MAE
        norm_pix: true,
        kept: 16, // of 64 patches
        mask_block: 1,
        resize: None,
        mean: [0.5; 3],
        std: [0.25; 3],
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.05,
        decay_tokens: false,
        clip: 1.0,
        seed: 0,
        record: true,
    };
    let mut trainer = Trainer::new(Device::cpu(), config, DType::F32, settings)?;
    for step in 0..60u32 {
        trainer.clear()?;
        for samples in [0..BATCH, BATCH..2 * BATCH].map(Vec::from_iter) {
            let images: Vec<u8> = samples.iter().flat_map(|&i| photo(i as usize)).collect();
            // Where a photo starts in `images`, its size, top and left of the crop, whether it is mirrored.
            let (size, [top, left]) =
                (SIZE.map(|n| n as i64), [5, 17].map(|n| i64::from(step) % n));
            let place = |i| [i * 3 * size[0] * size[1], size[0], size[1], top, left, i % 2];
            let geometry: Vec<i64> = (0..BATCH).flat_map(place).collect();
            // The ids of the samples decide their masks, with seed and epoch.
            let (images, geometry, samples) = (&images[..], &geometry[..], &samples[..]);
            trainer.accumulate(MicroBatch { images, geometry, samples, epoch: step }, 2)?;
        }
        let outcome = trainer.update(2e-3 * f64::from(step + 1).min(10.0) / 10.0)?;
        if step % 10 == 9 {
            println!("step {:2}  loss {:.4}  |g| {:.3}", step + 1, outcome.loss, outcome.grad_norm);
        }
    }
    // `trainer.mae` is yours to save: weights under MAE's names.
    println!("{:?}", trainer.mae.table().specs()[trainer.mae.table().patch_embed.weight]);
    Ok(())
}
