//! The model through the exported functions, against the trainer from Rust.

mod driven;

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::ptr::{null, null_mut};

use pixmim_core::cuda::SimtOptions;
use pixmim_core::train::checkpoint::{self, Contents, NamedTensor, State};
use pixmim_core::train::step::{MicroBatch, Settings, Trainer};
use pixmim_core::{Cpu, DType, Device, Gpu, Tensor, TensorList};

use self::driven::*;
use super::config::*;
use super::state::*;
use super::*;
use crate::context::PIXMIM_CPU;
use crate::status::*;
use crate::tensor::*;

fn gives_the_bits_of_a_trainer(
    context: &Context,
    config: &pixmim_model_config,
    dev: Device,
    dtype: DType,
) {
    let driven = create(context, config);
    let mut trainer = Trainer::new(dev, NET, dtype, step_settings()).unwrap();
    assert_eq!(driven.state(), trainer_state(&trainer));
    for number in 0..4 {
        assert_eq!(driven.step(number), trainer_step(&mut trainer, number), "step {number}");
    }
    assert_eq!(driven.state(), trainer_state(&trainer));
    assert_eq!(driven.updates(), 4);
}

#[test]
fn a_model_driven_in_pieces_gives_the_bits_of_a_trainer_on_the_cpu() {
    gives_the_bits_of_a_trainer(&Context::cpu(), &sizes(), Device::Cpu(Cpu::default()), DType::F32);
}

#[test]
fn a_model_driven_in_pieces_gives_the_bits_of_a_trainer_on_the_executor() {
    let gpu = || Device::Cuda(Gpu::simt(SimtOptions::default()).unwrap());
    for record in [0, 1] {
        let config = pixmim_model_config { dtype: PIXMIM_BF16, record, ..sizes() };
        gives_the_bits_of_a_trainer(&Context::simt(), &config, gpu(), DType::Bf16);
    }
}

#[test]
fn a_batch_and_a_learning_rate_on_the_device_give_the_same_bits() {
    let context = Context::simt();
    // SAFETY: the context is alive.
    let dev = unsafe { &*context.0 }.run_apart(|dev| Ok(dev.clone())).ok().unwrap();
    let config = pixmim_model_config { dtype: PIXMIM_BF16, ..sizes() };
    let (from_host, from_device) = (create(&context, &config), create(&context, &config));
    let Batch { images, geometry, samples, epoch } = &batch(0);
    let [epoch, samples] =
        [&epoch[..], samples].map(|x| Tensor::holding(&dev, x, &[x.len()]).unwrap());
    let images = Tensor::holding(&dev, images, &[images.len()]).unwrap();
    let geometry = Tensor::holding(&dev, geometry, &[IMAGES, 6]).unwrap();
    let lr = Tensor::holding(&dev, &[1e-3], &[1]).unwrap();
    let on_gpu = |tensor: &Tensor| Described::of(tensor.view(), 0).lent();
    let [images, geometry, samples, epoch, lr] =
        [&images, &geometry, &samples, &epoch, &lr].map(on_gpu);
    ok(from_host.forward(&batch(0), 1));
    ok(from_host.backward());
    // SAFETY: models and tensors are alive.
    unsafe {
        ok(pixmim_model_step(from_host.0, 1e-3, STREAM));
        let model = from_device.0;
        ok(pixmim_model_forward_loss(model, &images, &geometry, &samples, &epoch, 1, STREAM));
        ok(pixmim_model_backward(model, STREAM));
        ok(pixmim_model_step_with(model, &lr, STREAM));
    }
    assert!(from_host.outcome().updated);
    assert_eq!(from_host.outcome(), from_device.outcome());
    assert_eq!(from_host.state(), from_device.state());
}

#[test]
fn a_model_outlives_its_context_and_goes_on_from_a_copied_state() {
    for (context, dtype) in [(Context::cpu(), PIXMIM_F32), (Context::simt(), PIXMIM_BF16)] {
        let config = pixmim_model_config { dtype, ..sizes() };
        let (first, second) = (create(&context, &config), create(&context, &config));
        drop(context);
        first.step(0);
        (3..5).for_each(|number| assert!(second.step(number).updated));
        assert_ne!(first.state(), second.state());
        for kind in [PIXMIM_WEIGHT, PIXMIM_EXP_AVG, PIXMIM_EXP_AVG_SQ, PIXMIM_GRAD] {
            (0..first.count()).for_each(|i| second.set(kind, i, &first.get(kind, i)));
        }
        // SAFETY: the model is alive.
        ok(unsafe { pixmim_model_updates_set(second.0, first.updates(), STREAM) });
        assert_eq!(first.state(), second.state());
        assert_eq!(first.step(1), second.step(1));
        assert_eq!(first.state(), second.state());
        assert_eq!(second.updates(), 2);
    }
}

#[test]
fn weights_are_saved_and_loaded_with_what_is_known_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    for (context, dtype) in [(Context::cpu(), PIXMIM_F32), (Context::simt(), PIXMIM_BF16)] {
        let config = pixmim_model_config { dtype, norm_pix: 0, ..sizes() };
        let first = create(&context, &config);
        first.step(0);
        ok(first.save(&path));
        let (mut found, second) = (preset("tiny"), load(&context, &path, &config));
        // SAFETY: the path ends with a zero byte, the config is ours.
        ok(unsafe { pixmim_model_config_load(c_path(&path).as_ptr(), &raw mut found) });
        let of_preset = preset("tiny");
        let expected = pixmim_model_config {
            dtype: of_preset.dtype,
            micro_batch: of_preset.micro_batch,
            seed: of_preset.seed,
            weight_decay: of_preset.weight_decay,
            clip: of_preset.clip,
            decay_tokens: of_preset.decay_tokens,
            ..config
        };
        assert_eq!(found, expected);
        for i in 0..first.count() {
            assert_eq!(first.get(PIXMIM_WEIGHT, i), second.get(PIXMIM_WEIGHT, i));
            assert!(second.get(PIXMIM_EXP_AVG, i).iter().all(|&x| x == 0.0));
        }
        assert_eq!(second.updates(), 0);
        // The loss is that of the weights that the network computes with.
        for model in [&first, &second] {
            // SAFETY: the model is alive.
            ok(unsafe { pixmim_model_clear(model.0, STREAM) });
            ok(model.forward(&batch(1), 1));
        }
        let losses = [&first, &second].map(|model| model.outcome().loss);
        assert!(losses[0] == losses[1] && losses[0] > 0.0, "{losses:?}");
        let left = std::fs::read_dir(&folder).unwrap().count();
        assert_eq!(left, 1, "something is left beside the file");
    }
}

#[test]
fn a_checkpoint_of_training_is_gone_on_from() {
    let run = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(Device::cpu(), NET, DType::F32, step_settings()).unwrap();
    (0..2).for_each(|number| assert!(trainer_step(&mut trainer, number).updated));
    let dev = trainer.device().clone();
    let named = |list: &TensorList| -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let specs = trainer.mae.table().specs().iter().enumerate();
        let read = |i| dev.download::<f32>(list.view(i)).unwrap();
        specs.map(|(i, spec)| (spec.name.clone(), spec.shape.clone(), read(i))).collect()
    };
    let lists = [&trainer.mae.weights, &trainer.exp_avg, &trainer.exp_avg_sq].map(named);
    let [weights, exp_avg, exp_avg_sq] = lists.each_ref().map(|list| {
        let tensor = |(name, shape, data): &'_ (String, Vec<usize>, Vec<f32>)| NamedTensor {
            name: name.clone().leak(),
            shape: shape.clone(),
            data: data.clone().leak(),
        };
        list.iter().map(tensor).collect::<Vec<_>>()
    });
    let tables = [
        ("pos_embed", &trainer.mae.pos_embed),
        ("decoder_pos_embed", &trainer.mae.decoder_pos_embed),
    ];
    let frozen = tables.map(|(name, table)| NamedTensor {
        name,
        shape: [&[1], table.shape()].concat(),
        data: table.view().as_slice(),
    });
    let state = State {
        step: 3,
        samples: 12,
        seed: 5,
        skipped: 1,
        skipped_in_row: 0,
        steps_per_epoch: 7,
        smoothed_loss: 1.0,
        config_hash: String::new(),
        world_size: 1,
    };
    let (metadata, matmul_plans) = (BTreeMap::new(), Vec::new());
    let frozen = frozen.to_vec();
    let contents = Contents { weights, frozen, exp_avg, exp_avg_sq, metadata, state, matmul_plans };
    let folder = checkpoint::save(run.path(), &contents, 1).unwrap();

    let context = Context::cpu();
    let driven = load(&context, &folder, &sizes());
    assert_eq!(driven.updates(), 2);
    trainer.clear().unwrap();
    assert_eq!(driven.state(), trainer_state(&trainer));
    assert_eq!(driven.step(2), trainer_step(&mut trainer, 2));
    assert_eq!(driven.state(), trainer_state(&trainer));
}

#[test]
fn what_a_forward_pass_leaves_can_be_read() {
    let driven = create(&Context::cpu(), &sizes());
    ok(driven.forward(&batch(0), 1));
    let mut trainer = Trainer::new(Device::cpu(), NET, DType::F32, step_settings()).unwrap();
    let Batch { images, geometry, samples, epoch } = &batch(0);
    let images = MicroBatch { images, geometry, samples, epoch: epoch[0] as u32 };
    trainer.accumulate(images, 1).unwrap();
    let acts = trainer.activations();
    let real = |which, expected: &[f32], shape: &[i64]| {
        assert_eq!(output::<f32>(&driven, which, shape), expected)
    };
    real(PIXMIM_PRED, acts.pred.view().as_slice(), &[3, 12, 192]);
    real(PIXMIM_TARGET, trainer.target().view().as_slice(), &[3, 12, 192]);
    let ids = |which, expected: &[i32], shape: &[i64]| {
        assert_eq!(output::<i32>(&driven, which, shape), expected)
    };
    ids(PIXMIM_IDS_KEEP, acts.ids_keep.view().as_slice(), &[3, 4]);
    ids(PIXMIM_IDS_MASKED, acts.ids_predicted.view().as_slice(), &[3, 12]);
    ids(PIXMIM_IDS_RESTORE, acts.ids_restore.view().as_slice(), &[3, 16]);
}

#[test]
fn gradients_are_lent_for_the_caller_to_change() {
    let driven = create(&Context::cpu(), &sizes());
    ok(driven.forward(&batch(0), 1));
    ok(driven.backward());
    let mut grads = tensor(null_mut(), PIXMIM_F32, &[0]);
    // SAFETY: the model is alive, the tensor is ours.
    ok(unsafe { pixmim_model_grads(driven.0, &raw mut grads) });
    assert_eq!((grads.ndim, grads.dtype, grads.device), (1, PIXMIM_F32, PIXMIM_CPU));
    let before: Vec<_> = (0..driven.count()).map(|i| driven.get(PIXMIM_GRAD, i)).collect();
    // SAFETY: the lent tensor has as many elements, and no call runs.
    let lent = unsafe {
        std::slice::from_raw_parts_mut(grads.data.cast::<f32>(), grads.shape[0] as usize)
    };
    lent.iter_mut().for_each(|x| *x *= 2.0);
    for (i, before) in (0..).zip(&before) {
        let doubled: Vec<_> = before.iter().map(|x| 2.0 * x).collect();
        assert_eq!(driven.get(PIXMIM_GRAD, i), doubled);
    }
    // They cannot be where a call copies to.
    let (_, mut like) = driven.info(0);
    like.data = grads.data;
    // SAFETY: refused before it is read.
    let status =
        unsafe { pixmim_model_state_get(driven.0, PIXMIM_WEIGHT, 0, &raw const like, STREAM) };
    assert!(refused(status, PIXMIM_INVALID).contains("overlaps `the model's gradients`"));
}

#[test]
fn a_model_in_use_by_another_thread_is_busy() {
    let driven = create(&Context::cpu(), &sizes());
    // SAFETY: the model is alive.
    let held = unsafe { &*driven.0 }.inner.lock().unwrap();
    std::thread::scope(|scope| {
        let said = scope.spawn(|| refused(driven.backward(), PIXMIM_BUSY)).join().unwrap();
        assert!(said.contains("another thread"), "{said}");
    });
    drop(held);
    ok(driven.forward(&batch(0), 1));
}

#[test]
fn pieces_out_of_order_and_batches_that_do_not_fit_are_refused() {
    for context in [Context::cpu(), Context::simt()] {
        let driven = create(&context, &sizes());
        let out_of_order = || refused(driven.backward(), PIXMIM_INVALID);
        assert!(out_of_order().contains("forward_loss"));
        let mut outside = batch(0);
        outside.geometry[3] = 900;
        assert!(refused(driven.forward(&outside, 1), PIXMIM_INVALID).contains("geometry"));
        out_of_order();
        let mut fewer = batch(0);
        fewer.samples.pop();
        fewer.geometry.truncate(12);
        refused(driven.forward(&fewer, 1), PIXMIM_SHAPE);
        for count in [0, -1, i64::MAX] {
            let said = refused(driven.forward(&batch(0), count), PIXMIM_INVALID);
            assert!(said.contains("micro_batches"), "{said}");
        }
        ok(driven.forward(&batch(0), 1));
        ok(driven.backward());
        out_of_order();
        for lr in [f64::NAN, f64::INFINITY, -1e-3] {
            // SAFETY: the model is alive.
            let said = refused(unsafe { pixmim_model_step(driven.0, lr, STREAM) }, PIXMIM_INVALID);
            assert!(said.contains("`lr`"), "{said}");
        }
        // SAFETY: as above.
        ok(unsafe { pixmim_model_step(driven.0, 1e-3, STREAM) });
        assert!(driven.outcome().updated);
        for (kind, index) in [(4, 0), (-1, 0), (0, -1), (0, driven.count())] {
            let (_, mut like) = driven.info(0);
            let mut numbers = vec![0f32; 4096];
            (like.data, like.device) = (numbers.as_mut_ptr().cast(), PIXMIM_CPU);
            // SAFETY: refused, or copied into numbers that are there.
            let status =
                unsafe { pixmim_model_state_get(driven.0, kind, index, &raw const like, STREAM) };
            refused(status, PIXMIM_INVALID);
        }
        let like = host(&[0f32; 5], PIXMIM_F32);
        // SAFETY: refused for its shape.
        refused(
            unsafe { pixmim_model_state_set(driven.0, 0, 0, &raw const like, STREAM) },
            PIXMIM_SHAPE,
        );
    }
}

#[test]
fn configs_that_make_no_model_are_refused_by_name() {
    let context = Context::cpu();
    let no_model = |config: pixmim_model_config, status, name: &str| {
        let mut out = null_mut();
        // SAFETY: all three are ours.
        let said = refused(
            unsafe { pixmim_model_create(context.0, &raw const config, &raw mut out) },
            status,
        );
        assert!(said.contains(name), "{said} does not name {name}");
        assert!(out.is_null());
    };
    let base = sizes();
    type Change = fn(&mut pixmim_model_config);
    let changes: [(Change, &str); 24] = [
        (|c| c.struct_size -= 4, "struct_size"),
        (|c| c.image_size = -32, "image_size"),
        (|c| c.image_size = i64::MAX, "image_size"),
        (|c| c.patch_size = 7, "patch_size"),
        (|c| c.patch_size = 0, "patch_size"),
        (|c| c.dim = 66, "dim"),
        (|c| c.heads = 5, "heads"),
        (|c| c.depth = 0, "depth"),
        (|c| c.decoder_depth = 1 << 20, "decoder_depth"),
        (|c| c.decoder_heads = 0, "decoder_heads"),
        (|c| c.micro_batch = 0, "micro_batch"),
        (
            |c| {
                (c.micro_batch, c.image_size, c.patch_size, c.dim, c.depth) =
                    (1 << 16, 256, 1, 16384, 256)
            },
            "micro_batch",
        ),
        (|c| c.mask_block = 5, "mask_block"),
        (|c| c.seed = u64::MAX, "seed"),
        (|c| c.mask_ratio = 1.0, "mask_ratio"),
        (|c| c.mask_ratio = f64::NAN, "mask_ratio"),
        (|c| c.radius = f64::NAN, "radius"),
        (|c| c.std[1] = 0.0, "std"),
        (|c| c.mean[2] = f64::NAN, "mean"),
        (|c| c.betas[1] = 1.0, "betas"),
        (|c| c.eps = 0.0, "eps"),
        (|c| c.weight_decay = f64::NAN, "weight_decay"),
        (|c| c.norm_pix = 2, "norm_pix"),
        (|c| c.reserved = 1, "reserved"),
    ];
    for (change, name) in changes {
        let mut config = base;
        change(&mut config);
        no_model(config, PIXMIM_INVALID, name);
    }
    no_model(pixmim_model_config { dtype: PIXMIM_BF16, ..base }, PIXMIM_DTYPE, "dtype");
    no_model(pixmim_model_config { dtype: 77, ..base }, PIXMIM_DTYPE, "dtype");
    let mut out = null_mut();
    // SAFETY: refused before anything is read.
    unsafe {
        refused(pixmim_model_create(null(), &base, &raw mut out), PIXMIM_INVALID);
        refused(pixmim_model_create(context.0, null(), &raw mut out), PIXMIM_INVALID);
        refused(pixmim_model_create(context.0, &base, null_mut()), PIXMIM_INVALID);
        refused(pixmim_model_backward(null_mut(), STREAM), PIXMIM_INVALID);
        let misaligned = std::ptr::without_provenance_mut::<pixmim_model>(0x1001);
        refused(pixmim_model_backward(misaligned, STREAM), PIXMIM_INVALID);
        pixmim_model_destroy(null_mut());
        let mut config = base;
        let said =
            refused(pixmim_model_config_preset(c"vit".as_ptr(), &raw mut config), PIXMIM_INVALID);
        assert!(said.contains("demo") && said.contains("large"), "{said}");
        assert_eq!(config, base);
        config.struct_size = 8;
        refused(pixmim_model_config_preset(c"demo".as_ptr(), &raw mut config), PIXMIM_INVALID);
    }
}

#[test]
fn mae_has_no_radius() {
    let driven = create(&Context::cpu(), &pixmim_model_config { radius: 0.0, ..sizes() });
    let mae = Settings { radius: None, ..step_settings() };
    let mut trainer = Trainer::new(Device::cpu(), NET, DType::F32, mae).unwrap();
    assert_eq!(driven.step(0), trainer_step(&mut trainer, 0));
}

#[test]
fn files_that_hold_no_such_model_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let context = Context::cpu();
    let driven = create(&context, &sizes());
    let cannot = |path: &CStr, config: pixmim_model_config, status| {
        let mut out = null_mut();
        // SAFETY: all are ours, the path ends with a zero byte.
        let found =
            unsafe { pixmim_model_load(context.0, path.as_ptr(), &raw const config, &raw mut out) };
        assert!(out.is_null());
        refused(found, status)
    };
    assert!(cannot(&c_path(&path), sizes(), PIXMIM_IO).contains("weights.safetensors"));
    assert!(cannot(c"/\xff\xfe", sizes(), PIXMIM_INVALID).contains("`path` is not UTF-8"));
    ok(driven.save(&path));
    let deeper = pixmim_model_config { depth: 3, ..sizes() };
    let said = cannot(&c_path(&path), deeper, PIXMIM_CORRUPT);
    assert!(said.contains("`blocks.2.") && said.contains("is missing"), "{said}");
    let wider = pixmim_model_config { decoder_dim: 96, ..sizes() };
    let said = cannot(&c_path(&path), wider, PIXMIM_CORRUPT);
    assert!(said.contains("decoder"), "{said}");
    // An empty folder is no checkpoint; half a file is damaged.
    cannot(&c_path(folder.path()), sizes(), PIXMIM_IO);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    cannot(&c_path(&path), sizes(), PIXMIM_CORRUPT);
    // What cannot be written leaves nothing, and what was there.
    assert!(refused(driven.save(&folder.path().join("no/where")), PIXMIM_IO).contains("no/"));
    let mut numbers = driven.get(PIXMIM_WEIGHT, 0);
    numbers[3] = f32::NAN;
    driven.set(PIXMIM_WEIGHT, 0, &numbers);
    let said = refused(driven.save(&path), PIXMIM_INVALID);
    assert!(said.contains(&driven.info(0).0), "{said}");
    assert_eq!(std::fs::read(&path).unwrap().len(), bytes.len() / 2);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    let exact = create(&context, &pixmim_model_config { dtype: PIXMIM_F64, ..sizes() });
    refused(exact.save(&path), PIXMIM_DTYPE);
}

#[test]
fn every_preset_makes_a_config_that_passes() {
    for name in ["demo", "tiny", "small", "base", "large", "huge", "pixmim-vit-b-300e"] {
        preset(name).to_run().ok().unwrap().check().unwrap();
    }
}
