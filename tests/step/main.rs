//! A whole training step on a GPU: as on the CPU, and the same bits however it is scheduled or enqueued.
//!
//! The GPU is the host executor, or a real one with `PIXMIM_TEST_DEVICE=cuda`, as in `tests/kernels`.

#![expect(clippy::unwrap_used, reason = "a call that should succeed and does not is a failed test")]
#![cfg(pixmim_simt)]

use pixmim::cuda::{Epilogues, SimtOptions};
use pixmim::data::Image;
use pixmim::data::loader::Batch;
use pixmim::data::resize::{Rect, resize};
use pixmim::model::MaeConfig;
use pixmim::ops::input::Geometry;
use pixmim::ops::resize::Interpolation::Bicubic;
use pixmim::rng::{Purpose, Stream};
use pixmim::train::step::{Inputs, MicroBatch, Outcome, Settings, Trainer};
use pixmim::{DType, Device, Error, Gpu, TensorRef};

/// Small, and unlike in every size: encoder heads of 32, decoder heads of 16.
const NET: MaeConfig = MaeConfig {
    image_size: 32,
    patch_size: 8,
    dim: 64,
    depth: 2,
    heads: 2,
    decoder_dim: 48,
    decoder_depth: 2,
    decoder_heads: 3,
    mlp_ratio: 2,
};
const MICRO_BATCH: usize = 3;
const MICRO_BATCHES: usize = 2;

fn settings() -> Settings {
    Settings {
        micro_batch: MICRO_BATCH,
        radius: Some(5.7),
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

fn gpu(seed: u32) -> Device {
    gpu_with(SimtOptions { seed, ..SimtOptions::default() })
}

/// A real GPU has no such options; its epilogues are those of `PIXMIM_EPILOGUES`.
fn gpu_with(options: SimtOptions) -> Device {
    let is_real = std::env::var("PIXMIM_TEST_DEVICE").is_ok_and(|name| name == "cuda");
    Device::Cuda(match is_real {
        true => Gpu::nvidia(0).unwrap(),
        false => Gpu::simt(options).unwrap(),
    })
}

/// Images of several sizes, smooth with some noise, and a crop of each that reaches over an edge.
struct Images {
    bytes: Vec<u8>,
    geometry: Vec<i64>,
    samples: Vec<i64>,
}

fn images(first: usize) -> Images {
    images_with_margin(first, 0)
}

/// Images with so many more pixels to a side.
fn images_with_margin(first: usize, margin: usize) -> Images {
    let mut images = Images { bytes: vec![], geometry: vec![], samples: vec![] };
    for sample in first..first + MICRO_BATCH {
        let (height, width) = (33 + sample % 5 + margin, 36 + sample % 7 + margin);
        let row = Geometry {
            offset: images.bytes.len() as i64,
            height: height as i64,
            width: width as i64,
            top: (sample % 4) as i64 - 2,
            left: (sample % 3) as i64 - 1,
            flip: (sample % 2) as i64,
        };
        images.geometry.extend_from_slice(bytemuck::cast_slice(&[row]));
        images.samples.push(sample as i64);
        let noise = Stream::new(3, 0, sample as u64, Purpose::Init);
        for i in 0..3 * height * width {
            let (y, x, c) = (i / 3 / width, i / 3 % width, i % 3);
            let wave = ((y * (1 + sample) + 3 * x * (1 + c)) as f64 / 9.0).sin();
            let value = 128.0 + 90.0 * wave + 30.0 * (noise.uniform(i as u32) - 0.5);
            images.bytes.push(value as u8);
        }
    }
    images
}

/// One step of two micro-batches.
fn step(trainer: &mut Trainer, number: usize) -> Outcome {
    trainer.clear().unwrap();
    for micro in 0..MICRO_BATCHES {
        let images = images((number * MICRO_BATCHES + micro) * MICRO_BATCH);
        let batch = MicroBatch {
            images: &images.bytes,
            geometry: &images.geometry,
            samples: &images.samples,
            epoch: number as u32 / 4,
        };
        trainer.accumulate(batch, MICRO_BATCHES).unwrap();
    }
    trainer.update(1e-3).unwrap()
}

fn trainer(dev: Device, dtype: DType, settings: Settings) -> Trainer {
    Trainer::new(dev, NET, dtype, settings).unwrap()
}

/// Everything that a step changes, as bits.
fn state(trainer: &Trainer) -> Vec<u32> {
    let lists = [&trainer.mae.weights, &trainer.exp_avg, &trainer.exp_avg_sq, &trainer.grads];
    let read = |list: &pixmim::TensorList| trainer.device().download::<f32>(list.flat()).unwrap();
    lists.into_iter().flat_map(read).map(f32::to_bits).collect()
}

/// Cosine of the angle between two gradients of one tensor.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn follows_the_cpu(dtype: DType, settings: Settings, loss_off: f64, least_cosine: f64) {
    network_follows_the_cpu(gpu(0), NET, dtype, settings, loss_off, least_cosine);
}

fn network_follows_the_cpu(
    dev: Device,
    net: MaeConfig,
    dtype: DType,
    settings: Settings,
    loss_off: f64,
    least_cosine: f64,
) {
    let mut exact = Trainer::new(Device::cpu(), net, DType::F32, settings.clone()).unwrap();
    let mut tested = Trainer::new(dev, net, dtype, settings).unwrap();
    for number in 0..10 {
        let (want, got) = (step(&mut exact, number), step(&mut tested, number));
        assert!(got.updated);
        let off = (got.loss - want.loss).abs();
        assert!(off <= loss_off, "step {number}: loss {} for {}", got.loss, want.loss);
        // Later the weights have drifted apart, and gradients with them.
        if number > 0 {
            continue;
        }
        for (i, spec) in tested.mae.table().specs().iter().enumerate() {
            let grad = |trainer: &Trainer| {
                trainer.device().download::<f32>(trainer.grads.view(i)).unwrap()
            };
            let cosine = cosine(&grad(&tested), &grad(&exact));
            assert!(cosine >= least_cosine, "{}: cosine {cosine}", spec.name);
        }
    }
    assert_eq!(tested.updates().unwrap(), 10);
}

#[test]
fn ten_steps_in_f32_follow_the_cpu() {
    follows_the_cpu(DType::F32, settings(), 1e-4, 0.9999);
}

#[test]
fn ten_steps_in_bf16_follow_the_cpu() {
    follows_the_cpu(DType::Bf16, settings(), 5e-3, 0.999);
}

#[test]
fn ten_steps_on_raw_pixels_in_masked_blocks_follow_the_cpu() {
    let raw = Settings { radius: None, mask_block: 2, norm_pix: false, clip: 0.5, ..settings() };
    follows_the_cpu(DType::Bf16, raw, 5e-3, 0.999);
}

/// Patches of 14, as ViT-H has them: their 588 numbers fill no whole vectors. One decoder block, the first and the last.
#[test]
fn ten_steps_on_patches_of_14_follow_the_cpu() {
    let net = MaeConfig { image_size: 28, patch_size: 14, decoder_depth: 1, ..NET };
    let settings = Settings { kept: 1, radius: Some(5.0), ..settings() };
    network_follows_the_cpu(gpu(0), net, DType::Bf16, settings.clone(), 5e-3, 0.999);
    network_follows_the_cpu(gpu(0), net, DType::F32, settings, 1e-4, 0.9999);
}

/// GELU's other form is nearer to the exact one than bf16 is.
#[test]
fn ten_steps_with_gelu_and_bias_gradients_in_products_follow_the_cpu() {
    let epilogues = Epilogues { gelu: true, bias: true };
    let dev = gpu_with(SimtOptions { epilogues, ..SimtOptions::default() });
    network_follows_the_cpu(dev, NET, DType::Bf16, settings(), 5e-3, 0.999);
}

#[test]
fn epilogues_change_the_bits_they_should_and_no_others() {
    let run = |dtype, gelu, bias| {
        let epilogues = Epilogues { gelu, bias };
        let options = SimtOptions { epilogues, ..SimtOptions::default() };
        let mut trainer = trainer(Device::Cuda(Gpu::simt(options).unwrap()), dtype, settings());
        let outcome = step(&mut trainer, 0);
        let grad = |i| trainer.device().download::<f32>(trainer.grads.view(i)).unwrap();
        let specs = trainer.mae.table().specs().iter().enumerate();
        let grads: Vec<_> = specs.map(|(i, spec)| (spec.name.clone(), grad(i))).collect();
        (outcome.loss, grads)
    };
    let plain = run(DType::F32, false, false);
    assert!(run(DType::F32, true, false) == plain, "in f32 GELU stays a pass");
    let bias = run(DType::F32, false, true);
    assert_eq!(bias.0, plain.0);
    let pairs = bias.1.iter().zip(&plain.1);
    let changed: Vec<_> =
        pairs.filter(|(with, without)| with != without).map(|((name, _), _)| name).collect();
    assert!(!changed.is_empty(), "sums in another order round in another way");
    assert!(changed.iter().all(|name| name.ends_with("bias")), "{changed:?}");
    assert!(run(DType::Bf16, true, false).0 != run(DType::Bf16, false, false).0);
}

#[test]
fn no_schedule_changes_a_bit() {
    let run = |seed| {
        let mut trainer = trainer(gpu(seed), DType::Bf16, settings());
        let outcomes: Vec<_> = (0..3).map(|number| step(&mut trainer, number)).collect();
        (outcomes, state(&trainer))
    };
    let first = run(0);
    for seed in [0, 1, 7] {
        assert!(run(seed) == first, "other bits under seed {seed}");
    }
}

#[test]
fn recorded_work_gives_the_bits_of_work_enqueued_piece_by_piece() {
    let run = |record| {
        let mut trainer = trainer(gpu(0), DType::Bf16, Settings { record, ..settings() });
        let outcomes: Vec<_> = (0..4).map(|number| step(&mut trainer, number)).collect();
        (outcomes, state(&trainer))
    };
    assert!(run(true) == run(false));
}

#[test]
fn a_micro_batch_gives_the_bits_of_its_pieces_whatever_memory_it_comes_in() {
    type Accumulate = fn(&mut Trainer, &Images);
    let whole: Accumulate = |trainer, images| {
        let Images { bytes: images, geometry, samples } = images;
        trainer.accumulate(MicroBatch { images, geometry, samples, epoch: 2 }, 2).unwrap();
    };
    let buffer: Accumulate = |trainer, images| {
        let mut batch = Batch { samples: images.samples.clone(), epoch: 2, ..Batch::default() };
        batch.geometry = bytemuck::cast_slice(&images.geometry).to_vec();
        batch.images = trainer.device().host_buffer(images.bytes.len());
        batch.images.copy_from_slice(&images.bytes);
        trainer.accumulate_batch(&batch, 2).unwrap();
        batch.images.fill(0);
    };
    let pieces: Accumulate = |trainer, images| {
        let inputs = Inputs {
            images: TensorRef::new(&images.bytes, &[images.bytes.len()]).unwrap(),
            geometry: TensorRef::new(&images.geometry, &[MICRO_BATCH, 6]).unwrap(),
            samples: TensorRef::new(&images.samples, &[MICRO_BATCH]).unwrap(),
            epoch: TensorRef::new(&[2_i64], &[1]).unwrap(),
        };
        trainer.forward_loss(inputs, 2).unwrap();
        trainer.backward().unwrap();
    };
    let run = |accumulate: Accumulate| {
        let mut trainer = trainer(gpu(0), DType::Bf16, settings());
        let outcomes: Vec<_> = (0..3)
            .map(|step| {
                trainer.clear().unwrap();
                (0..2).for_each(|micro| accumulate(&mut trainer, &images(3 * (2 * step + micro))));
                assert!(trainer.backward().is_err(), "every forward pass has had its backward");
                trainer.update(1e-3).unwrap()
            })
            .collect();
        (outcomes, state(&trainer))
    };
    let expected = run(whole);
    assert!(run(buffer) == expected && run(pieces) == expected);
}

#[test]
fn a_batch_that_outgrows_the_recorded_one_is_recorded_anew() {
    let run = |record| {
        let mut trainer = trainer(gpu(0), DType::Bf16, Settings { record, ..settings() });
        let mut grow = |number: usize, margin| {
            let images = images_with_margin(number * MICRO_BATCH, margin);
            let batch = MicroBatch {
                images: &images.bytes,
                geometry: &images.geometry,
                samples: &images.samples,
                epoch: 0,
            };
            trainer.accumulate(batch, 1).unwrap();
            let outcome = trainer.update(1e-3).unwrap();
            trainer.clear().unwrap();
            outcome
        };
        let margins = [0, 0, 0, 40, 40, 40, 0, 20].into_iter().enumerate();
        let outcomes: Vec<_> = margins.map(|(number, margin)| grow(number, margin)).collect();
        (outcomes, state(&trainer))
    };
    assert!(run(true) == run(false));
}

/// The images of [`images_with_margin`], whole, to be resampled; and the same as crops that the host has resampled.
fn rectangles_and_crops(first: usize, margin: usize) -> [Images; 2] {
    let mut rectangles = images_with_margin(first, margin);
    let mut crops = Images { bytes: vec![], geometry: vec![], samples: rectangles.samples.clone() };
    let side = NET.image_size;
    for row in rectangles.geometry.as_chunks_mut::<6>().0 {
        let [offset, height, width, top, left, flip] = row;
        (*top, *left) = (0, 0);
        let (height, width) = (*height as usize, *width as usize);
        let pixels = rectangles.bytes[*offset as usize..][..3 * height * width].to_vec();
        let image = Image { height, width, pixels: pixels.into() };
        let crop = resize(&image, Rect::whole(&image), (side, side), Bicubic);
        crops.geometry.extend([crops.bytes.len() as i64, side as i64, side as i64, 0, 0, *flip]);
        crops.bytes.extend_from_slice(&crop.pixels);
    }
    [rectangles, crops]
}

#[test]
fn images_resampled_on_the_device_give_the_bits_of_images_resampled_on_the_host() {
    let run = |dev: Device, dtype, radius, on_device: bool| {
        let settings = Settings { radius, resize: on_device.then_some(Bicubic), ..settings() };
        let mut trainer = trainer(dev, dtype, settings);
        // Recorded, run again, and recorded anew for larger images.
        for (number, margin) in [0, 0, 9, 60].into_iter().enumerate() {
            let [rectangles, crops] = rectangles_and_crops(number * MICRO_BATCH, margin);
            let images = if on_device { rectangles } else { crops };
            let batch = MicroBatch {
                images: &images.bytes,
                geometry: &images.geometry,
                samples: &images.samples,
                epoch: 0,
            };
            trainer.accumulate(batch, 1).unwrap();
            assert!(trainer.update(1e-3).unwrap().updated);
            trainer.clear().unwrap();
        }
        state(&trainer)
    };
    for radius in [None, settings().radius] {
        assert!(run(gpu(0), DType::Bf16, radius, true) == run(gpu(0), DType::Bf16, radius, false));
    }
    let on_cpu = |on_device| run(Device::cpu(), DType::F32, None, on_device);
    assert!(on_cpu(true) == on_cpu(false));
}

#[test]
fn rectangles_that_are_to_be_cropped_besides_are_refused_before_they_are_copied() {
    let mut trainer =
        trainer(gpu(0), DType::Bf16, Settings { resize: Some(Bicubic), ..settings() });
    let images = images(0);
    let batch = MicroBatch {
        images: &images.bytes,
        geometry: &images.geometry,
        samples: &images.samples,
        epoch: 0,
    };
    let why = trainer.accumulate(batch, 1).unwrap_err().to_string();
    assert!(why.starts_with("`resize::forward: geometry` of image 0 does not fit"), "{why}");
}

#[test]
fn a_step_that_is_not_finite_changes_no_weight_and_the_next_one_goes_on() {
    let mut trainer = trainer(gpu(0), DType::Bf16, settings());
    let dev = trainer.device().clone();
    (0..3).for_each(|number| assert!(step(&mut trainer, number).updated));
    let weights = |trainer: &Trainer| dev.download::<f32>(trainer.mae.weights.flat()).unwrap();
    let before = weights(&trainer);
    // A weight that overflows reaches the loss.
    let mut spoilt = before.clone();
    spoilt[trainer.mae.weights.offset(trainer.mae.table().decoder_pred.bias)] = f32::INFINITY;
    dev.upload(trainer.mae.weights.flat_mut(), &spoilt).unwrap();
    trainer.mae.round(&dev).unwrap();
    let moments = dev.download::<f32>(trainer.exp_avg.flat()).unwrap();
    let outcome = step(&mut trainer, 3);
    assert!(!outcome.updated && !outcome.loss.is_finite());
    assert_eq!(trainer.updates().unwrap(), 3);
    assert_eq!(weights(&trainer), spoilt);
    assert_eq!(dev.download::<f32>(trainer.exp_avg.flat()).unwrap(), moments);
    dev.upload(trainer.mae.weights.flat_mut(), &before).unwrap();
    trainer.mae.round(&dev).unwrap();
    assert!(step(&mut trainer, 3).updated);
    assert_eq!(trainer.updates().unwrap(), 4);
    assert!(weights(&trainer).iter().all(|x| x.is_finite()));
}

#[test]
fn a_batch_whose_crops_leave_its_images_is_refused_before_it_is_copied() {
    let mut trainer = trainer(gpu(0), DType::Bf16, settings());
    step(&mut trainer, 0);
    let mut images = images(0);
    images.geometry[3] = 200;
    let batch = MicroBatch {
        images: &images.bytes,
        geometry: &images.geometry,
        samples: &images.samples,
        epoch: 0,
    };
    let why = trainer.accumulate(batch, MICRO_BATCHES).unwrap_err().to_string();
    assert!(why.contains("geometry") && why.contains("image 0"), "{why}");
    assert!(step(&mut trainer, 1).updated);
}

#[test]
fn a_trainer_goes_on_with_its_own_memory_only_and_records_anew() {
    let dev = gpu(0);
    let run = |change: bool| {
        let mut trainer = trainer(dev.clone(), DType::Bf16, settings());
        let outcomes: Vec<_> = (0..4)
            .map(|number| {
                if change {
                    trainer.set_device(dev.clone()).unwrap();
                }
                step(&mut trainer, number)
            })
            .collect();
        (outcomes, state(&trainer))
    };
    assert!(run(true) == run(false));
    let mut trainer = trainer(dev.clone(), DType::Bf16, settings());
    for other in [gpu(0), Device::cpu()] {
        let why = trainer.set_device(other).unwrap_err();
        assert!(matches!(why, Error::Place { .. }), "{why}");
    }
}

#[test]
fn a_micro_batch_that_does_not_fit_is_refused_with_one_that_does() {
    let bytes = |micro_batch| {
        let settings = Settings { micro_batch, ..settings() };
        trainer(gpu(0), DType::Bf16, settings).memory_bytes() as u64
    };
    let fits = bytes(8);
    assert!(bytes(16) > fits + fits / 4);
    // Room for 8 images, and the share that is left free.
    let options = SimtOptions { memory_bytes: fits + fits / 16, ..SimtOptions::default() };
    let small = || Device::Cuda(Gpu::simt(options).unwrap());
    let build = |micro_batch| {
        Trainer::new(small(), NET, DType::Bf16, Settings { micro_batch, ..settings() }).map(drop)
    };
    assert!(build(8).is_ok());
    let why = build(64).unwrap_err().to_string();
    assert!(why.starts_with("`optim.micro_batch` is 64, which needs"), "{why}");
    assert!(why.ends_with("; 8 fits"), "{why}");
}

#[test]
fn settings_that_leave_nothing_to_see_or_to_predict_are_refused() {
    let refusal = |settings| {
        let made = Trainer::new(Device::cpu(), NET, DType::F32, settings);
        made.map(drop).unwrap_err().to_string()
    };
    for kept in [0, 16, 17, usize::MAX] {
        let why = refusal(Settings { kept, ..settings() });
        assert!(why.starts_with(&format!("`kept` is {kept} of 16 patches")), "{why}");
    }
    let why = refusal(Settings { micro_batch: 0, ..settings() });
    assert!(why.starts_with("`micro_batch` is 0"), "{why}");
}
