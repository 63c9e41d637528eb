//! `pretrain_vit doctor`: what was found on this machine, what is missing, and what to type next.
//! Nothing is trained or left behind.

use std::fs::OpenOptions;
use std::path::Path;

use pixmim::Products;
#[cfg(feature = "cuda")]
use pixmim::cuda::{kernels, probe};

use crate::cli::{PHOTOS, RUNS};
use crate::program::say;

const COMMAND: &str = "cargo run --release --example pretrain_vit";

/// Prints the findings, and the next command as the last line.
pub(crate) fn examine() {
    say(&format!("pixmim {}, built by {}", pixmim::VERSION, pixmim::RUSTC));
    row("cpu", true, &cpu());
    row("memory", true, &memory().unwrap_or_else(|| "size unknown on this system".into()));
    gpu();

    let photos = count_photos(Path::new(PHOTOS));
    row("photos", photos > 0, &format!("{photos} images in {PHOTOS}"));
    if photos == 0 {
        cure("give --data FOLDER with photos of your own");
    }
    let writable = writable(Path::new(RUNS));
    match &writable {
        Ok(()) => row("runs", true, &format!("./{RUNS} can be written")),
        Err(error) => {
            row("runs", false, &format!("./{RUNS} cannot be written: {error}"));
            cure("give --out FOLDER on a disk that can be written");
        }
    }

    let mut next = String::from(COMMAND);
    if photos == 0 || writable.is_err() {
        next.push_str(" --");
    }
    if photos == 0 {
        next.push_str(" --data FOLDER");
    }
    if writable.is_err() {
        next.push_str(" --out FOLDER");
    }
    say(&format!("next: {next}"));
}

fn row(what: &str, ok: bool, found: &str) {
    say(&format!(" {what:<8}  {:<2}  {found}", if ok { "ok" } else { "--" }));
}

fn cure(text: &str) {
    say(&format!("               {text}"));
}

fn cpu() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let features = features();
    let features = if features.is_empty() {
        "no vector extensions known here".into()
    } else {
        features.join(" ")
    };
    let products = if Products::bf16_is_fast() { "bf16" } else { "f32" };
    format!("{cores} cores, {features}; fastest products: {products}")
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512_bf16", is_x86_feature_detected!("avx512bf16")),
    ]
    .into_iter()
    .filter_map(|(name, detected)| detected.then_some(name))
    .collect()
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<&'static str> {
    let neon = std::arch::is_aarch64_feature_detected!("neon");
    let bf16 = std::arch::is_aarch64_feature_detected!("bf16");
    [("neon", neon), ("bf16", bf16)]
        .into_iter()
        .filter_map(|(name, detected)| detected.then_some(name))
        .collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<&'static str> {
    Vec::new()
}

/// Memory by `/proc/meminfo`, which has `MemTotal:  1234 kB`.
fn memory() -> Option<String> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let gib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: f64 = line.trim_start_matches(':').split_whitespace().next()?.parse().ok()?;
        Some(kib / f64::from(1 << 20))
    };
    Some(format!("{:.1} GiB, {:.1} GiB of it available", gib("MemTotal")?, gib("MemAvailable")?))
}

/// What the library itself finds when it is asked for a GPU.
#[cfg(feature = "cuda")]
fn gpu() {
    match probe::probe() {
        Ok(found) => {
            for line in found.to_string().lines() {
                row("gpu", true, line);
            }
        }
        Err(why) => {
            row("gpu", false, "none that can be used: training runs on the CPU");
            cure(&why.to_string());
        }
    }
    let (kernels, compiled) = (kernels::KERNELS.len(), !kernels::FATBINS.is_empty());
    let built = if compiled { "compiled for GPUs" } else { "not compiled for GPUs" };
    row("kernels", compiled, &format!("{kernels} CUDA kernels, {built}"));
    if !compiled {
        cure("run scripts/get-nvcc and build again, or set CUDA_HOME");
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu() {
    row("gpu", false, "this build leaves CUDA out: training runs on the CPU");
}

fn count_photos(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => count_photos(&entry.path()),
            Ok(_) => usize::from(is_photo(&entry.path())),
            Err(_) => 0,
        })
        .sum()
}

fn is_photo(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    ["jpg", "jpeg", "png", "webp"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Tries to write where runs go: in the folder if it is there, else where it would be made.
fn writable(runs: &Path) -> std::io::Result<()> {
    let folder = if runs.exists() { runs } else { Path::new(".") };
    let probe = folder.join(format!(".pixmim-doctor-{}.tmp", std::process::id()));
    OpenOptions::new().write(true).create_new(true).open(&probe)?;
    std::fs::remove_file(&probe)
}
