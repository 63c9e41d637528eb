//! A model driven through the exported functions, and the same from Rust.

use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use pixmim_core::cuda::SimtOptions;
use pixmim_core::model::MaeConfig;
use pixmim_core::train::step::{MicroBatch, Outcome, Settings, Trainer};
use pixmim_core::{Device, Gpu, TensorList};

use super::super::config::*;
use super::super::state::*;
use super::super::*;
use crate::context::{PIXMIM_CPU, pixmim_context_create, pixmim_context_destroy};
use crate::status::*;
use crate::tensor::*;

pub(super) const IMAGES: usize = 3;
pub(super) const NET: MaeConfig = MaeConfig {
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

/// Not the legacy default stream; the executor has no streams and takes any.
pub(super) const STREAM: *mut c_void = std::ptr::without_provenance_mut(64);

pub(super) fn sizes() -> pixmim_model_config {
    pixmim_model_config {
        struct_size: size_of::<pixmim_model_config>() as u32,
        dtype: PIXMIM_F32,
        image_size: 32,
        patch_size: 8,
        dim: 64,
        depth: 2,
        heads: 2,
        decoder_dim: 48,
        decoder_depth: 2,
        decoder_heads: 3,
        mlp_ratio: 2,
        micro_batch: IMAGES as i64,
        mask_block: 1,
        seed: 5,
        mask_ratio: 0.75,
        radius: 5.7,
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.05,
        clip: 0.7,
        norm_pix: 1,
        decay_tokens: 0,
        record: 0,
        reserved: 0,
    }
}

pub(super) fn step_settings() -> Settings {
    let sizes = sizes();
    Settings {
        micro_batch: IMAGES,
        radius: Some(sizes.radius),
        norm_pix: true,
        kept: 4,
        mask_block: 1,
        resize: None,
        mean: sizes.mean,
        std: sizes.std,
        betas: sizes.betas,
        eps: sizes.eps,
        weight_decay: sizes.weight_decay,
        decay_tokens: false,
        clip: sizes.clip,
        seed: sizes.seed,
        record: true,
    }
}

/// A context, closed when dropped.
pub(super) struct Context(pub(super) *mut pixmim_context);

impl Context {
    pub(super) fn cpu() -> Self {
        let mut out = null_mut();
        // SAFETY: NULL options are let pass; `out` is ours.
        ok(unsafe { pixmim_context_create(PIXMIM_CPU, null(), &raw mut out) });
        Self(out)
    }

    pub(super) fn simt() -> Self {
        let gpu = Gpu::simt(SimtOptions::default()).unwrap();
        Self(Box::into_raw(Box::new(pixmim_context::with(0, Device::Cuda(gpu), None))))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made in `cpu` or `simt`, and dropped once.
        unsafe { pixmim_context_destroy(self.0) };
    }
}

/// A model, freed when dropped.
pub(super) struct Driven(pub(super) *mut pixmim_model);

// SAFETY: the ABI judges calls from several threads.
unsafe impl Sync for Driven {}

impl Drop for Driven {
    fn drop(&mut self) {
        // SAFETY: made by the ABI, and dropped once.
        unsafe { pixmim_model_destroy(self.0) };
    }
}

pub(super) fn last_error() -> String {
    // SAFETY: a text of this thread's, ended by a zero byte.
    unsafe { CStr::from_ptr(pixmim_last_error()) }.to_str().unwrap().to_owned()
}

pub(super) fn ok(status: pixmim_status) {
    assert_eq!(status, PIXMIM_OK, "{}", last_error());
}

/// The sentence of a call that is refused in this way.
pub(super) fn refused(status: pixmim_status, expected: pixmim_status) -> String {
    assert_eq!(status, expected, "{}", last_error());
    last_error()
}

pub(super) fn create(context: &Context, config: &pixmim_model_config) -> Driven {
    let mut out = null_mut();
    // SAFETY: all three are ours.
    ok(unsafe { pixmim_model_create(context.0, config, &raw mut out) });
    Driven(out)
}

pub(super) fn host<T>(data: &[T], dtype: i32) -> pixmim_tensor {
    tensor(data.as_ptr().cast_mut().cast(), dtype, &[data.len() as i64])
}

pub(super) fn tensor(data: *mut c_void, dtype: i32, shape: &[i64]) -> pixmim_tensor {
    // SAFETY: a tensor of zeros is a tensor.
    let mut out: pixmim_tensor = unsafe { std::mem::zeroed() };
    // SAFETY: `out` is ours, the shape has as many numbers.
    ok(unsafe {
        let rank = shape.len() as i32;
        pixmim_tensor_init(&raw mut out, data, dtype, PIXMIM_CPU, rank, shape.as_ptr())
    });
    out
}

pub(super) struct Batch {
    pub(super) images: Vec<u8>,
    pub(super) geometry: Vec<i64>,
    pub(super) samples: Vec<i64>,
    pub(super) epoch: [i64; 1],
}

pub(super) fn batch(number: usize) -> Batch {
    let (height, width) = (33 + number % 3, 36);
    let bytes = 3 * height * width;
    let value = |i: usize| {
        let (y, x) = (i / 3 / width, i / 3 % width);
        127.0 + 90.0 * ((y * (2 + i / bytes) + (number + 1) * x + i % 3) as f64 / 9.0).sin()
    };
    let row = |i: usize| [(i * bytes) as i64, height as i64, width as i64, -1, 2, (i % 2) as i64];
    Batch {
        images: (0..IMAGES * bytes).map(|i| value(i) as u8).collect(),
        geometry: (0..IMAGES).flat_map(row).collect(),
        samples: (0..IMAGES).map(|i| (number * IMAGES + i) as i64).collect(),
        epoch: [number as i64 / 2],
    }
}

impl Driven {
    pub(super) fn forward(&self, batch: &Batch, micro_batches: i64) -> pixmim_status {
        let mut geometry = host(&batch.geometry, PIXMIM_I64);
        geometry = tensor(geometry.data, PIXMIM_I64, &[batch.samples.len() as i64, 6]);
        let [images, samples, epoch] = [
            host(&batch.images, PIXMIM_U8),
            host(&batch.samples, PIXMIM_I64),
            host(&batch.epoch, PIXMIM_I64),
        ];
        // SAFETY: the tensors view the batch, which outlives the call.
        unsafe {
            let [images, geometry] = [&raw const images, &raw const geometry];
            let [samples, epoch] = [&raw const samples, &raw const epoch];
            pixmim_model_forward_loss(
                self.0,
                images,
                geometry,
                samples,
                epoch,
                micro_batches,
                STREAM,
            )
        }
    }

    pub(super) fn backward(&self) -> pixmim_status {
        // SAFETY: the model is alive.
        unsafe { pixmim_model_backward(self.0, STREAM) }
    }

    pub(super) fn outcome(&self) -> Outcome {
        let (mut loss, mut grad_norm, mut updated) = (f64::NAN, f64::NAN, -1);
        // SAFETY: the model is alive, the numbers are ours.
        ok(unsafe {
            let numbers = (&raw mut loss, &raw mut grad_norm, &raw mut updated);
            pixmim_model_outcome(self.0, numbers.0, numbers.1, numbers.2, STREAM)
        });
        assert!(updated == 0 || updated == 1);
        Outcome { loss, grad_norm, updated: updated == 1 }
    }

    /// A step of two micro-batches.
    pub(super) fn step(&self, number: usize) -> Outcome {
        // SAFETY: the model is alive.
        ok(unsafe { pixmim_model_clear(self.0, STREAM) });
        for micro in 0..2 {
            ok(self.forward(&batch(2 * number + micro), 2));
            ok(self.backward());
        }
        // SAFETY: as above.
        ok(unsafe { pixmim_model_step(self.0, 1e-3, STREAM) });
        self.outcome()
    }

    pub(super) fn count(&self) -> i64 {
        let mut count = -1;
        // SAFETY: the model is alive, the number is ours.
        ok(unsafe { pixmim_model_state_count(self.0, &raw mut count) });
        count
    }

    /// Name of a weight, and a tensor like it without data.
    pub(super) fn info(&self, index: i64) -> (String, pixmim_tensor) {
        let (mut name, mut like) = (null(), tensor(null_mut(), PIXMIM_F32, &[0]));
        // SAFETY: the model is alive, the rest is ours; the name lives as long as the model.
        unsafe {
            ok(pixmim_model_state_info(self.0, index, &raw mut name, &raw mut like));
            (CStr::from_ptr(name).to_str().unwrap().to_owned(), like)
        }
    }

    pub(super) fn get(&self, kind: i32, index: i64) -> Vec<f32> {
        let (_, mut like) = self.info(index);
        let mut numbers =
            vec![0f32; like.shape[..like.ndim as usize].iter().product::<i64>() as usize];
        (like.data, like.device) = (numbers.as_mut_ptr().cast(), PIXMIM_CPU);
        // SAFETY: `like` views the numbers.
        ok(unsafe { pixmim_model_state_get(self.0, kind, index, &raw const like, STREAM) });
        numbers
    }

    pub(super) fn set(&self, kind: i32, index: i64, numbers: &[f32]) {
        let (_, mut like) = self.info(index);
        (like.data, like.device) = (numbers.as_ptr().cast_mut().cast(), PIXMIM_CPU);
        // SAFETY: `like` views the numbers, which are of its shape.
        ok(unsafe { pixmim_model_state_set(self.0, kind, index, &raw const like, STREAM) });
    }

    /// All of the state, as bits.
    pub(super) fn state(&self) -> Vec<u32> {
        let kinds = [PIXMIM_WEIGHT, PIXMIM_EXP_AVG, PIXMIM_EXP_AVG_SQ, PIXMIM_GRAD];
        let all = kinds.into_iter().flat_map(|kind| (0..self.count()).map(move |i| (kind, i)));
        all.flat_map(|(kind, i)| self.get(kind, i)).map(f32::to_bits).collect()
    }

    pub(super) fn updates(&self) -> i64 {
        let mut updates = -1;
        // SAFETY: the model is alive, the number is ours.
        ok(unsafe { pixmim_model_updates_get(self.0, &raw mut updates, STREAM) });
        updates
    }

    pub(super) fn save(&self, path: &Path) -> pixmim_status {
        let path = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the model is alive, the path ends with a zero byte.
        unsafe { pixmim_model_save(self.0, path.as_ptr(), STREAM) }
    }
}

/// The same from Rust.
pub(super) fn trainer_step(trainer: &mut Trainer, number: usize) -> Outcome {
    trainer.clear().unwrap();
    for micro in 0..2 {
        let Batch { images, geometry, samples, epoch } = &batch(2 * number + micro);
        let batch = MicroBatch { images, geometry, samples, epoch: epoch[0] as u32 };
        trainer.accumulate(batch, 2).unwrap();
    }
    trainer.update(1e-3).unwrap()
}

pub(super) fn trainer_state(trainer: &Trainer) -> Vec<u32> {
    let lists = [&trainer.mae.weights, &trainer.exp_avg, &trainer.exp_avg_sq, &trainer.grads];
    let read = |list: &TensorList| -> Vec<f32> {
        let dev = trainer.device();
        (0..list.len()).flat_map(|i| dev.download::<f32>(list.view(i)).unwrap()).collect()
    };
    lists.into_iter().flat_map(read).map(f32::to_bits).collect()
}

pub(super) fn preset(name: &str) -> pixmim_model_config {
    let (mut config, name) = (sizes(), CString::new(name).unwrap());
    // SAFETY: the name ends with a zero byte, the config is ours.
    ok(unsafe { pixmim_model_config_preset(name.as_ptr(), &raw mut config) });
    config
}

pub(super) fn c_path(path: &Path) -> CString {
    CString::new(path.to_str().unwrap()).unwrap()
}

pub(super) fn load(context: &Context, path: &Path, config: &pixmim_model_config) -> Driven {
    let (path, mut out) = (c_path(path), null_mut());
    // SAFETY: all are ours, the path ends with a zero byte.
    ok(unsafe { pixmim_model_load(context.0, path.as_ptr(), config, &raw mut out) });
    Driven(out)
}

pub(super) fn output<T: Copy + Default>(driven: &Driven, which: i32, shape: &[i64]) -> Vec<T> {
    let mut like = tensor(null_mut(), PIXMIM_F32, &[0]);
    // SAFETY: the model is alive, the tensor is ours.
    ok(unsafe { pixmim_model_output_info(driven.0, which, &raw mut like, STREAM) });
    assert_eq!(&like.shape[..like.ndim as usize], shape);
    let mut numbers = vec![T::default(); shape.iter().product::<i64>() as usize];
    like.data = numbers.as_mut_ptr().cast();
    // SAFETY: `like` views the numbers, which are as many.
    ok(unsafe { pixmim_model_output_get(driven.0, which, &raw const like, STREAM) });
    numbers
}
