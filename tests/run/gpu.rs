//! Runs on the host executor, which stands in for a GPU: the loop, its checkpoints and pictures are the same.
#![cfg(pixmim_simt)]

use std::fs;

use pixmim::train::StepRecord;
use pixmim::train::config::{Config, Crop};
use pixmim::train::metrics;
use pixmim::train::run::{Options, Resume};
use tempfile::tempdir;

use crate::{Said, checkpoint, photos, tiny, train};

#[test]
fn a_run_on_a_gpu_can_be_stopped_and_gone_on_with_bit_for_bit() {
    let (data, dir) = (photos(13), tempdir().unwrap());
    let config = |name: &str| {
        let mut config = tiny(data.path(), &dir.path().join(name));
        config.runtime.device = "simt".into();
        config.runtime.precision = "auto".into();
        config.schedule.steps = Some(6);
        config
    };
    let (whole, halves) = (config("whole"), config("halves"));
    let mut said = Said::default();
    train(&whole, &Options::default(), None, &mut said).unwrap();
    assert_eq!(said.losses.len(), 6);
    assert!(said.losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{:?}", said.losses);
    assert!(said.losses[5] < said.losses[0], "{:?}", said.losses);

    let first = train(&halves, &Options::default(), Some(4), &mut Said::default()).unwrap();
    assert!(first.interrupted);
    let on = Options { resume: Resume::Auto, ..Options::default() };
    let mut said = Said::default();
    train(&halves, &on, None, &mut said).unwrap();
    assert!(!said.warnings.iter().any(|text| text.contains("planned anew")), "{:?}", said.warnings);
    // The executor's times mean nothing.
    let records = metrics::read::<StepRecord>(&whole.log.out).unwrap();
    assert!(records.len() > 1 && records.iter().all(|r| r.mfu.is_nan() && r.tflop_per_s.is_nan()));
    let tensors = |config: &Config| -> Vec<_> {
        let files =
            fs::read_dir(checkpoint(&config.log.out, 6)).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<_> =
            files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
        files.sort();
        files.iter().map(|path| fs::read(path).unwrap()).collect()
    };
    assert!(tensors(&whole).len() >= 2);
    assert!(tensors(&whole) == tensors(&halves), "weights or moments differ");
    assert!(whole.log.out.join("viz/step-00000004.png").is_file());
}

#[test]
fn plans_of_products_that_are_of_another_gpu_are_told_and_not_used() {
    let (data, dir) = (photos(13), tempdir().unwrap());
    let mut config = tiny(data.path(), &dir.path().join("run"));
    config.runtime.device = "simt".into();
    config.schedule.steps = Some(4);
    train(&config, &Options::default(), Some(2), &mut Said::default()).unwrap();
    let saved = checkpoint(&config.log.out, 2);
    // The executor has none, and goes on without a word: see the test above.
    assert!(!saved.join("matmul-plans.bin").exists());
    let plans = b"pixmim matmul plans 1 of some GPU";
    fs::write(saved.join("matmul-plans.bin"), plans).unwrap();
    let manifest = fs::read_to_string(saved.join("MANIFEST")).unwrap();
    let line = format!("matmul-plans.bin  {}  {:08x}\n", plans.len(), crc32c::crc32c(plans));
    fs::write(saved.join("MANIFEST"), manifest + &line).unwrap();

    let mut said = Said::default();
    let on = Options { resume: Resume::Auto, ..Options::default() };
    let summary = train(&config, &on, None, &mut said).unwrap();
    assert_eq!(summary.steps, 4);
    let told = said.warnings.iter().filter(|text| text.contains("are planned anew"));
    assert_eq!(told.count(), 1, "{:?}", said.warnings);
}

#[test]
fn what_a_gpu_computes_in_bf16_follows_the_cpu() {
    let (data, dir) = (photos(13), tempdir().unwrap());
    let losses = |device: &str, crop| {
        let mut config = tiny(data.path(), &dir.path().join(format!("{device} {crop:?}")));
        config.method.crop = crop;
        config.runtime.device = device.into();
        config.runtime.precision = if device == "simt" { "bf16".into() } else { "f32".into() };
        config.schedule.steps = Some(4);
        let mut said = Said::default();
        train(&config, &Options::default(), None, &mut said).unwrap();
        said.losses
    };
    // The GPU resizes random crops itself.
    for crop in [Crop::Simple, Crop::RandomResized] {
        for (gpu, cpu) in losses("simt", crop).into_iter().zip(losses("cpu", crop)) {
            assert!((gpu - cpu).abs() <= 5e-3, "{crop:?}: {gpu} {cpu}");
        }
    }
}
