//! Times the training step on images in memory: input, low-pass target, masking, forward, loss, backward, AdamW.
//! `scripts/compare-cpu` runs it in turn with the same step in PyTorch. Prints one line of `key=value`, or with `--csv` a
//! line of names and one of values; times are medians over the steps. `mfu` is the share of a large product's rate,
//! measured before.

mod workload;

use std::time::Instant;

use clap::builder::PossibleValuesParser;
use clap::{Parser, ValueEnum};
use pixmim::train::{cost, peaks};
use pixmim::{Device, Error, Result};
use workload::{Images, LSMAE, Precision, SMALL64, TINY, VIT_B, VIT_H, VIT_L, Workload};

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    /// Image 32, patch 8, encoder 64 x 2 x 2, decoder 48 x 2 x 3, batch 2: for --device simt.
    Tiny,
    /// Image 64, patch 8, encoder 192 x 6 x 3, decoder 96 x 2 x 3, batch 64.
    Small64,
    /// ViT-B/16 at 224, decoder 512 x 8 x 16, batch 8.
    #[value(name = "vit_b")]
    VitB,
    /// ViT-L/16 at 224, decoder 512 x 8 x 16, batch 8.
    #[value(name = "vit_l")]
    VitL,
    /// ViT-H/14 at 224, decoder 512 x 8 x 16, batch 8.
    #[value(name = "vit_h")]
    VitH,
    /// ViT-B/16 at 448, masked in blocks of 2 x 2, decoder 512 x 8 x 16, batch 8.
    Lsmae,
}

impl Size {
    fn workload(self) -> Workload {
        match self {
            Self::Tiny => TINY,
            Self::Small64 => SMALL64,
            Self::VitB => VIT_B,
            Self::VitL => VIT_L,
            Self::VitH => VIT_H,
            Self::Lsmae => LSMAE,
        }
    }
}

/// Times the training step.
#[derive(Parser)]
struct Cli {
    /// The network and its batch.
    #[arg(long, value_enum, default_value = "small64")]
    size: Size,
    /// Where it runs; auto: on a GPU where there is one.
    #[arg(long, default_value = "cpu")]
    #[arg(value_parser = PossibleValuesParser::new(["auto", "cpu", "cuda", "simt"]))]
    device: String,
    /// Precision of matrix products; on a GPU of all that is computed.
    #[arg(long, value_parser = PossibleValuesParser::new(["f32", "bf16"]), default_value = "f32")]
    precision: String,
    /// Images of an update [default: the micro-batch].
    #[arg(long)]
    batch: Option<usize>,
    /// Images at a time [default: as the size has; on a GPU up to 1024, as many as fit].
    #[arg(long)]
    micro_batch: Option<usize>,
    /// Steps that are timed.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Steps before those. A GPU plans its products in the first, and records the step in the second.
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Threads that compute; 0: one for each core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print comma-separated values.
    #[arg(long)]
    csv: bool,
}

/// What was measured: seconds of each step, and the last one's loss.
struct Measured {
    workload: Workload,
    micro_batches: usize,
    seconds: Vec<f64>,
    loss: f64,
    memory_bytes: usize,
    /// Operations of a step's products.
    flops: u64,
    /// Those that a second can have, measured before; none on the host executor, whose times mean nothing.
    peak: Option<f64>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let dev = workload::device(&cli.device)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cli.threads).build();
    let pool = pool.map_err(|error| Error::invalid("threads", error.to_string()))?;
    let measured = pool.install(|| time(&cli, &dev))?;
    print(&cli, &dev, measured);
    Ok(())
}

fn time(cli: &Cli, dev: &Device) -> Result<Measured> {
    let precision = if cli.precision == "f32" { Precision::F32 } else { Precision::Bf16 };
    let (dev, dtype) = precision.on(dev);
    let mut workload = cli.size.workload();
    workload.images = cli.micro_batch.or(cli.batch).unwrap_or(workload.images).max(1);
    let peak = match &dev {
        Device::Cuda(gpu) if gpu.properties().executor => None,
        _ => Some(peaks::product(&dev, dtype)?.flops_per_second()),
    };
    let mut trainer = match (&dev, cli.micro_batch, cli.size) {
        (Device::Cuda(_), None, Size::VitB | Size::VitL | Size::VitH | Size::Lsmae) => {
            let trainer;
            let most = cli.batch.unwrap_or(1024);
            (workload, trainer) = workload.fitting(most, &dev, dtype)?;
            trainer
        }
        _ => workload.trainer(&dev, dtype)?,
    };
    let batch = cli.batch.unwrap_or(workload.images);
    if batch == 0 || !batch.is_multiple_of(workload.images) {
        let why = format!("is {batch}; choose a multiple of the micro-batch, {}", workload.images);
        return Err(Error::invalid("batch", why));
    }
    let micro_batches = batch / workload.images;
    let images = Images::new(&workload);
    let (mut seconds, mut loss) = (Vec::new(), f64::NAN);
    for epoch in 0..cli.warmup + cli.steps.max(1) {
        let start = Instant::now();
        loss = workload::step(&mut trainer, &images, micro_batches, epoch as u32)?.loss;
        if epoch >= cli.warmup {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let (memory_bytes, flops) = (trainer.memory_bytes(), cost::step(&trainer, micro_batches).flops);
    Ok(Measured { workload, micro_batches, seconds, loss, memory_bytes, flops, peak })
}

#[expect(clippy::print_stdout, reason = "its output")]
fn print(cli: &Cli, dev: &Device, measured: Measured) {
    let Measured { workload, micro_batches, mut seconds, loss, memory_bytes, flops, peak } =
        measured;
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let batch = micro_batches * workload.images;
    let flops_per_s = flops as f64 / median;
    let of_peak = |text: &dyn Fn(f64) -> String| peak.map(text).unwrap_or_default();
    let device = match dev {
        Device::Cuda(gpu) => gpu.properties().name.replace([' ', ','], "_"),
        _ => "cpu".into(),
    };
    let (_, commit) = pixmim::VERSION.split_once("git ").unwrap_or_default();
    let values = [
        ("size", workload.name.to_owned()),
        ("precision", cli.precision.clone()),
        ("batch", batch.to_string()),
        ("micro_batch", workload.images.to_string()),
        ("images_per_s", format!("{:.2}", batch as f64 / median)),
        ("ms_per_step", format!("{:.3}", 1e3 * median)),
        ("tflop_per_s", of_peak(&|_| format!("{:.4}", flops_per_s / 1e12))),
        ("mfu", of_peak(&|peak| format!("{:.4}", flops_per_s / peak))),
        ("peak_tflop_per_s", of_peak(&|peak| format!("{:.4}", peak / 1e12))),
        ("memory_mib", (memory_bytes >> 20).to_string()),
        ("peak_rss_mib", peak_rss_mib().to_string()),
        ("loss", format!("{loss:.4}")),
        ("device", device),
        ("commit", commit.trim_end_matches(')').to_owned()),
        ("products", switches(dev)),
    ];
    if cli.csv {
        println!("{}", values.each_ref().map(|(name, _)| *name).join(","));
        println!("{}", values.map(|(_, value)| value).join(","));
    } else {
        println!("{}", values.map(|(name, value)| format!("{name}={value}")).join(" "));
    }
}

/// How a GPU was told to do matrix products: `timed+gelu+bias` at most, `default` at least.
fn switches(dev: &Device) -> String {
    let set = |name| std::env::var(name).ok().map(|value| value.replace(',', "+"));
    let switches: Vec<_> = match dev {
        Device::Cuda(gpu) if !gpu.properties().executor => {
            ["PIXMIM_MATMUL", "PIXMIM_EPILOGUES"].into_iter().filter_map(set).collect()
        }
        _ => Vec::new(),
    };
    if switches.is_empty() { "default".into() } else { switches.join("+") }
}

/// Most memory this process had at once, from `/proc`; 0 where there is none.
fn peak_rss_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
