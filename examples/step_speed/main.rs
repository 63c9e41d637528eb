//! Times the training step on images in memory: input, low-pass target, masking, forward, loss, backward, AdamW.
//! `scripts/compare-cpu` runs it in turn with the same step in PyTorch. Prints one line:
//! `images_per_s=… ms_per_step=… peak_rss_mib=… loss=…`, medians over the steps.

#[expect(dead_code, reason = "names are for the benches")]
mod workload;

use std::time::Instant;

use clap::{Parser, ValueEnum};
use pixmim::{Products, Result};
use workload::{Images, SMALL64, VIT_B, Workload};

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
    let workload = match cli.size {
        Size::Small64 => SMALL64,
        Size::VitB => VIT_B,
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cli.threads).build();
    let pool = pool.map_err(|error| pixmim::Error::invalid("threads", error.to_string()))?;
    let (times, loss) = pool.install(|| time(&cli, &workload))?;
    let mut sorted = times;
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    println!(
        "images_per_s={:.2} ms_per_step={:.3} peak_rss_mib={} loss={loss:.4}",
        workload.images as f64 / median,
        1e3 * median,
        peak_rss_mib()
    );
    Ok(())
}

fn time(cli: &Cli, workload: &Workload) -> Result<(Vec<f64>, f64)> {
    let products = if cli.precision == Precision::F32 { Products::F32 } else { Products::Bf16 };
    let mut trainer = workload.trainer(products)?;
    let images = Images::new(workload);
    let mut times = Vec::new();
    let mut loss = f64::NAN;
    for epoch in 0..cli.warmup + cli.steps.max(1) {
        let start = Instant::now();
        loss = workload::step(&mut trainer, &images, epoch as u32)?.loss;
        if epoch >= cli.warmup {
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
