//! The micro-batch is a matter of memory, not of result.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pixmim::data::decode;
use pixmim::data::loader::{Batch, Loader, LoaderConfig, Resample};
use pixmim::data::source::Source;
use pixmim::ops::random_masking;
use pixmim::train::checkpoint::TensorFile;
use pixmim::train::config::{Auto, Crop, Interpolation};
use pixmim::train::step::{Settings, Trainer};
use pixmim::{Arena, DType, Device, TensorRef};
use tempfile::tempdir;

use crate::{checkpoint, metrics_of, photos, tiny, train_anew};

const SPLITS: [usize; 3] = [8, 4, 2];

/// The batches of the first `steps` steps of 8 images, `micro` at a time.
pub(crate) fn batches(data: &Path, micro: usize, steps: usize) -> Vec<Batch> {
    let source = Arc::new(Source::open(data, &decode::Options::default()).unwrap());
    let config = LoaderConfig {
        image_size: 16,
        crop: Crop::Simple,
        padding: 2,
        crop_scale: [0.2, 1.0],
        interpolation: Interpolation::Bicubic,
        flip: 0.5,
        seed: 5,
        global_batch: 8,
        micro_batch: micro,
        threads: 2,
        prefetch: 3,
        cache_bytes: 0,
        max_bad_share: 0.0,
        resample: Resample::OnHost,
    };
    let mut loader = Loader::new(source, config, 0).unwrap();
    let never = AtomicBool::new(false);
    (0..steps * 8 / micro).map(|_| loader.next(&never).unwrap().unwrap()).collect()
}

pub(crate) fn settings(micro_batch: usize) -> Settings {
    Settings {
        micro_batch,
        radius: Some(2.9),
        norm_pix: true,
        kept: 4,
        mask_block: 1,
        resize: None,
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.05,
        decay_tokens: false,
        clip: 0.0,
        seed: 5,
        record: true,
    }
}

/// Kept and masked patches of each sample, as a trainer with this seed draws them for one micro-batch.
fn masks(batch: &Batch) -> Vec<Vec<i32>> {
    let images = batch.samples.len();
    let ((mut keep, mut masked, mut restore, mut workspace), _) =
        Arena::build(&Device::cpu(), "test", |arena| {
            (
                arena.tensor(DType::I32, &[images, 4]),
                arena.tensor(DType::I32, &[images, 12]),
                arena.tensor(DType::I32, &[images, 16]),
                arena.tensor(
                    DType::U8,
                    &[random_masking::workspace_bytes(&Device::cpu(), images, 16)],
                ),
            )
        })
        .unwrap();
    random_masking::forward(
        &Device::cpu(),
        random_masking::Forward {
            ids_keep: keep.view_mut(),
            ids_masked: masked.view_mut(),
            ids_restore: restore.view_mut(),
            noise: random_masking::Noise::Drawn {
                seed: 5,
                epoch: TensorRef::new(&[i64::from(batch.epoch)], &[1]).unwrap(),
                samples: TensorRef::new(&batch.samples, &[images]).unwrap(),
            },
            block: 1,
            workspace: workspace.view_mut(),
        },
    )
    .unwrap();
    let of_image = |b: usize| {
        let [keep, masked] = [(&keep, 4), (&masked, 12)]
            .map(|(ids, count)| ids.view().as_slice::<i32>()[b * count..][..count].to_vec());
        [keep, masked].concat()
    };
    (0..images).map(of_image).collect()
}

#[test]
fn samples_crops_and_masks_of_a_step_do_not_depend_on_the_micro_batch() {
    let data = photos(21);
    let seen = SPLITS.map(|micro| {
        let batches = batches(data.path(), micro, 5);
        let images = batches.iter().flat_map(|batch| {
            let crops = batch.geometry.iter().map(|g| (g.height, g.width, g.top, g.left, g.flip));
            let samples = batch.samples.iter().map(|&sample| (batch.step, batch.epoch, sample));
            samples.zip(crops).zip(masks(batch))
        });
        let pixels: Vec<u8> = batches.iter().flat_map(|batch| batch.images.to_vec()).collect();
        (images.collect::<Vec<_>>(), pixels)
    });
    assert_eq!(seen[0].0.len(), 40);
    assert!(seen[0] == seen[1] && seen[0] == seen[2]);
    // The third step begins the third epoch of two steps: the same image is masked anew.
    let (first, again) = seen[0]
        .0
        .iter()
        .enumerate()
        .find_map(|(i, (image, mask))| {
            let later = seen[0].0[i + 1..].iter().find(|(other, _)| other.0.2 == image.0.2)?;
            Some((mask, &later.1))
        })
        .unwrap();
    assert_ne!(first, again);
}

/// In f64 the sums of one, two and four parts are the same to the last digits but one or two.
#[test]
fn the_gradient_of_a_step_is_the_mean_over_its_micro_batches() {
    let data = photos(8);
    let results = SPLITS.map(|micro| {
        let config = tiny(data.path(), data.path()).model;
        let mut trainer = Trainer::new(Device::cpu(), config, DType::F64, settings(micro)).unwrap();
        trainer.clear().unwrap();
        for batch in &batches(data.path(), micro, 1) {
            trainer.accumulate_batch(batch, 8 / micro).unwrap();
        }
        let outcome = trainer.update(1e-3).unwrap();
        assert!(outcome.updated);
        (outcome, trainer.exp_avg.flat().as_slice::<f64>().to_vec())
    });
    let (whole, rest) = results.split_first().unwrap();
    for (outcome, moments) in rest {
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs();
        assert!(close(whole.0.loss, outcome.loss), "{whole:?} {outcome:?}");
        assert!(close(whole.0.grad_norm, outcome.grad_norm), "{whole:?} {outcome:?}");
        for (a, b) in whole.1.iter().zip(moments) {
            assert!((a - b).abs() <= 1e-14, "{a}, {b}");
        }
    }
}

#[test]
fn whole_runs_agree_within_the_rounding_of_f32() {
    let (data, runs) = (photos(24), tempdir().unwrap());
    let outs = SPLITS.map(|micro| {
        let out = runs.path().join(micro.to_string());
        let mut config = tiny(data.path(), &out);
        config.optim.micro_batch = micro;
        // Adam divides by the root of the second moment: an epsilon above the rounding of the gradient keeps it from
        // making steps out of noise where the gradient is zero, as that of the keys' bias is.
        config.optim.eps = 1e-4;
        config.runtime.threads = Auto::Value(1);
        train_anew(&config);
        out
    });
    let (whole, rest) = outs.split_first().unwrap();
    let read = |run: &Path, file: &str| {
        let file = checkpoint(run, 10).join(file);
        TensorFile::open(&file).unwrap();
        floats(&std::fs::read(file).unwrap())
    };
    for other in rest {
        for (a, b) in metrics_of(whole).iter().zip(metrics_of(other)) {
            assert!((a.loss - b.loss).abs() <= 1e-5 * a.loss, "{a:?} {b:?}");
            assert!((a.grad_norm - b.grad_norm).abs() <= 1e-5 * a.grad_norm, "{a:?} {b:?}");
        }
        for file in ["model.safetensors", "optim.safetensors"] {
            let (a, b) = (read(whole, file), read(other, file));
            let norm = a.iter().map(|a| a * a).sum::<f64>().sqrt();
            let error = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
            assert!(error <= 1e-5 * norm, "{file}: {error} of {norm}");
        }
    }
}

/// All numbers of a safetensors file of f32.
fn floats(bytes: &[u8]) -> Vec<f64> {
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let numbers = bytes[8 + header..].chunks_exact(4);
    numbers.map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
}
