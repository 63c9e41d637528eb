//! Times the training step on images in memory: input, low-pass target, masking, forward, loss, backward, AdamW.
//! `scripts/compare-cpu` runs it in turn with the same step in PyTorch. Prints one line:
//! `images_per_s=… ms_per_step=… peak_rss_mib=… loss=…`, medians over the steps.

use std::time::Instant;

use clap::{Parser, ValueEnum};
use pixmim::model::MaeConfig;
use pixmim::ops::random_masking;
use pixmim::rng::{Purpose, Stream};
use pixmim::train::step::{MicroBatch, Settings, Trainer};
use pixmim::{Cpu, DType, Device, Products, Result};

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    /// Image 64, patch 8, encoder 192 x 6 x 3, decoder 96 x 2 x 3, batch 64.
    Small64,
    /// ViT-B/16 at 224, decoder 512 x 8 x 16, batch 8.
    #[value(name = "vit_b")]
    VitB,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Precision {
    /// f32 products.
    F32,
    /// bf16 products, f32 sums.
    Bf16,
}

/// Times the training step.
#[derive(Parser)]
struct Cli {
    /// The network and its batch.
    #[arg(long, value_enum, default_value = "small64")]
    size: Size,
    /// Precision of matrix products.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Steps that are timed.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Steps before those.
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Threads that compute; 0: one for each core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[expect(clippy::print_stdout, reason = "its one line of output")]
fn main() -> Result<()> {
    let cli = Cli::parse();
    let (config, images) = match cli.size {
        Size::Small64 => (small64(), 64),
        Size::VitB => (MaeConfig::VIT_BASE_PATCH16, 8),
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cli.threads).build();
    let pool = pool.map_err(|error| pixmim::Error::invalid("threads", error.to_string()))?;
    let (times, loss) = pool.install(|| time(&cli, config, images))?;
    let mut sorted = times;
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    println!(
        "images_per_s={:.2} ms_per_step={:.3} peak_rss_mib={} loss={loss:.4}",
        images as f64 / median,
        1e3 * median,
        peak_rss_mib()
    );
    Ok(())
}

fn small64() -> MaeConfig {
    MaeConfig {
        image_size: 64,
        patch_size: 8,
        dim: 192,
        depth: 6,
        heads: 3,
        decoder_dim: 96,
        decoder_depth: 2,
        decoder_heads: 3,
        mlp_ratio: 4,
    }
}

fn time(cli: &Cli, config: MaeConfig, images: usize) -> Result<(Vec<f64>, f64)> {
    let side = config.image_size;
    let settings = Settings {
        micro_batch: images,
        radius: Some(40.0 * side as f64 / 224.0),
        norm_pix: true,
        kept: random_masking::kept(config.patches(), 0.75),
        mask_block: 1,
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.05,
        decay_tokens: false,
        clip: 0.0,
        seed: 0,
    };
    let products = if cli.precision == Precision::F32 { Products::F32 } else { Products::Bf16 };
    let mut trainer = Trainer::new(Device::Cpu(Cpu { products }), config, DType::F32, settings)?;
    let bytes = side * side * 3;
    let noise = Stream::new(1, 0, 0, Purpose::Augment);
    let pixels: Vec<u8> = (0..images * bytes).map(|i| noise.word(i as u32) as u8).collect();
    let geometry: Vec<i64> = (0..images)
        .flat_map(|i| [(i * bytes) as i64, side as i64, side as i64, 0, 0, (i % 2) as i64])
        .collect();
    let samples: Vec<i64> = (0..images as i64).collect();
    let mut times = Vec::new();
    let mut loss = f64::NAN;
    for step in 0..cli.warmup + cli.steps.max(1) {
        let start = Instant::now();
        trainer.clear();
        let epoch = step as u32;
        let batch = MicroBatch { images: &pixels, geometry: &geometry, samples: &samples, epoch };
        trainer.accumulate(batch, 1)?;
        loss = trainer.update(1e-4)?.loss;
        if step >= cli.warmup {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    Ok((times, loss))
}

/// Most memory this process had at once, from `/proc`; 0 where there is none.
fn peak_rss_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
