//! Runs of a small network from beginning to end: the same bits whatever the threads, whatever interrupts it, whatever
//! images are bad.
#![cfg(feature = "train")]
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod accumulation;
mod bad_images;
mod divergence;
mod folder;
mod gpu;
mod profile;
mod resume;
mod threads;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use pixmim::Result;
use pixmim::model::MaeConfig;
use pixmim::train::StepRecord;
use pixmim::train::config::{Auto, Config};
use pixmim::train::metrics;
use pixmim::train::run::{Event, Options, Resume, Summary, run};
use tempfile::{TempDir, tempdir};

/// A folder of `count` PNG files of different sizes: smooth gradients with an edge, so that there is something to learn.
fn photos(count: usize) -> TempDir {
    let folder = tempdir().unwrap();
    for i in 0..count {
        write_photo(&photo(folder.path(), i), i);
    }
    folder
}

/// Path of image `i` of such a folder.
fn photo(folder: &Path, i: usize) -> PathBuf {
    folder.join(format!("class_{}/{i:03}.png", i % 3))
}

fn write_photo(path: &Path, seed: usize) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let (height, width) = (17 + seed % 5, 29 - seed % 7);
    let pixel = |y: usize, x: usize, c: usize| {
        let slope = (seed * 37 % 11) * x + (seed * 53 % 13) * y + 29 * c * (seed % 5);
        let edge = if (x + seed) % 12 > 5 + y / 6 { 60 } else { 0 };
        ((40 + slope / 2 + edge + seed * 7) % 256) as u8
    };
    let pixels: Vec<u8> = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| pixel(y, x, c))))
        .collect();
    let file = fs::File::create(path).unwrap();
    let mut encoder = png::Encoder::new(file, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

/// A network of 16 patches that takes 10 steps of 2 x 4 images in a blink. No two sizes are alike where they need not be.
fn tiny(data: &Path, out: &Path) -> Config {
    let mut config = Config::preset("demo").unwrap();
    config.model = MaeConfig {
        image_size: 16,
        patch_size: 4,
        dim: 24,
        depth: 2,
        heads: 3,
        decoder_dim: 16,
        decoder_depth: 1,
        decoder_heads: 2,
        mlp_ratio: 4,
    };
    config.data.path = data.to_owned();
    config.optim.global_batch = 8;
    config.optim.micro_batch = 4;
    config.optim.base_lr = None;
    config.optim.lr = Some(2e-3);
    config.schedule.steps = Some(10);
    config.schedule.warmup = "3it".into();
    config.runtime.precision = "f32".into();
    config.runtime.threads = Auto::Value(2);
    config.log.out = out.to_owned();
    config.log.every = 1;
    config.log.picture_every = 4;
    config.log.picture_images = 2;
    config.log.checkpoint_every = 0;
    config
}

/// What a run said.
#[derive(Default)]
struct Said {
    warnings: Vec<String>,
    losses: Vec<f64>,
}

/// Runs `config`; `stop_after` steps done, it is asked to stop as a signal would.
fn train(
    config: &Config,
    options: &Options,
    stop_after: Option<u64>,
    said: &mut Said,
) -> Result<Summary> {
    let stop = AtomicBool::new(stop_after == Some(0));
    run(config, options, &stop, &mut |event| match event {
        Event::Step { record, .. } => {
            said.losses.push(record.loss);
            if stop_after.is_some_and(|step| record.step >= step) {
                stop.store(true, Ordering::Relaxed);
            }
        }
        Event::Warning(text) => said.warnings.push(text.to_owned()),
        _ => {}
    })
}

/// Runs `config` in a new folder to its end.
fn train_anew(config: &Config) -> Summary {
    let summary = train(config, &Options::default(), None, &mut Said::default()).unwrap();
    assert!(!summary.interrupted);
    summary
}

/// Goes on with the run of `config`, to its end or until `stop_after` steps are done.
fn go_on(config: &Config, stop_after: Option<u64>) -> Summary {
    let options = Options { resume: Resume::Auto, ..Options::default() };
    train(config, &options, stop_after, &mut Said::default()).unwrap()
}

/// Folder of the checkpoint of `step`.
fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join(format!("ckpt/step-{step:08}"))
}

/// All bytes of weights, position tables and both moments of the checkpoint of `step`.
fn tensors(run: &Path, step: u64) -> [Vec<u8>; 2] {
    ["model.safetensors", "optim.safetensors"]
        .map(|file| fs::read(checkpoint(run, step).join(file)).unwrap())
}

/// The logged steps without what is measured by the clock.
fn metrics_of(run: &Path) -> Vec<StepRecord> {
    let records = metrics::read::<StepRecord>(run).unwrap();
    let untimed =
        |r| StepRecord { images_per_s: 0.0, data_wait: 0.0, tflop_per_s: 0.0, mfu: 0.0, ..r };
    records.into_iter().map(untimed).collect()
}

/// Fails unless two finished runs of `steps` steps left the same weights, moments, counters, metrics, bad images and
/// pictures, bit for bit.
fn assert_same_run(what: &str, a: &Path, b: &Path, steps: u64) {
    assert!(tensors(a, steps) == tensors(b, steps), "{what}: weights or moments differ");
    let state = |run| fs::read_to_string(checkpoint(run, steps).join("state.toml")).unwrap();
    assert_eq!(state(a), state(b), "{what}");
    assert_eq!(metrics_of(a), metrics_of(b), "{what}");
    let bad = |run| metrics::read::<metrics::BadImage>(run).unwrap();
    assert_eq!(bad(a), bad(b), "{what}");
    let (pictures, others) = (files(&a.join("viz")), files(&b.join("viz")));
    assert!(pictures == others, "{what}: {:?}, {:?}", pictures.len(), others.len());
}

/// Name and bytes of each file in a folder, by name.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    files.sort();
    files
}
