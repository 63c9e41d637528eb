//! A whole model: network, gradients, optimizer and the step over them, driven piece by piece.

pub mod config;
pub mod state;
#[cfg(test)]
mod tests;

use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::sync::{Mutex, TryLockError};

use pixmim_core::model::params::Spec;
use pixmim_core::train::config::Config;
use pixmim_core::train::run::settings;
use pixmim_core::train::step::{Inputs, Settings, Trainer};
use pixmim_core::{DType, Device, TensorRef};

use self::config::{Saved, of_file, pixmim_model_config, utf8};
use crate::call::{self, Call, size};
use crate::context::pixmim_context;
use crate::status::{Failure, Outcome, PIXMIM_BUSY, PIXMIM_INTERNAL, guard, pixmim_status};
use crate::tensor::{Described, expect_dtype, expect_like, pixmim_tensor, pointee, pointee_mut};

/// A masked autoencoder with its gradients, optimizer and memory. One thread uses it at a time: calls from two at once are
/// refused with PIXMIM_BUSY. A call on another stream than the one before must be ordered after that by the caller, by an
/// event say.
pub struct pixmim_model {
    context: pixmim_context,
    /// Name of each weight, and a tensor like it.
    weights: Vec<(CString, pixmim_tensor)>,
    /// All gradients as one vector.
    grads: Described,
    inner: Mutex<Model>,
}

struct Model {
    trainer: Trainer,
    config: Config,
    records: bool,
    /// The caller's stream that it was last used on.
    stream: Option<usize>,
}

impl pixmim_model {
    /// A model whose weights `start` may replace.
    fn new(
        context: &pixmim_context,
        given: &pixmim_model_config,
        start: impl FnOnce(&mut Trainer) -> Outcome + Send,
    ) -> Outcome<Self> {
        let (config, records) = (given.to_run()?, given.records()?);
        config.check()?;
        // On a stream of the context's own, as memory is given back on the stream it was made on.
        let trainer = context.run_apart(|dev| {
            let settings = Settings { record: records, ..settings(&config, &config.resolved()) };
            let dtype = given.dtype_on(dev)?;
            let mut trainer = Trainer::new(dev.clone(), config.model, dtype, settings)?;
            start(&mut trainer)?;
            trainer.synchronize()?;
            Ok(trainer)
        })?;
        let weight = |(i, spec): (usize, &Spec)| {
            let like = Described::of(trainer.mae.weights.view(i), context.device).lent();
            let name = CString::new(&*spec.name).unwrap_or_default();
            (name, pixmim_tensor { data: std::ptr::null_mut(), ..like })
        };
        let weights = trainer.mae.table().specs().iter().enumerate().map(weight).collect();
        let grads = Described::of(trainer.grads.flat(), context.device);
        let inner = Mutex::new(Model { trainer, config, records, stream: None });
        Ok(Self { context: context.clone(), weights, grads, inner })
    }
}

impl Model {
    /// Goes on where the caller's stream is.
    fn enter(&mut self, stream: *mut c_void, dev: &Device) -> Outcome {
        if self.stream == Some(stream.addr()) {
            return Ok(());
        }
        if self.records && stream.is_null() && matches!(dev, Device::Cuda(_)) {
            let why = "is the legacy default stream, which cannot be recorded; make one, or set record to 0";
            return Err(Failure::invalid("stream", why));
        }
        self.trainer.set_device(dev.clone())?;
        self.stream = Some(stream.addr());
        Ok(())
    }
}

/// Runs the body of an exported function of a model.
fn with(
    model: *const pixmim_model,
    stream: *mut c_void,
    body: impl FnOnce(&pixmim_model, &Call<'_>, &mut Model) -> Outcome,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it came from `pixmim_model_create` or `pixmim_model_load`.
        let model = unsafe { pointee("model", model) }?;
        let mut inner = match model.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::WouldBlock) => {
                let why = "`model` is in use by another thread; its calls come one at a time";
                return Err(Failure::new(PIXMIM_BUSY, why.into()));
            }
            Err(TryLockError::Poisoned(_)) => {
                let why = "`model` was left half-way by the defect that an earlier call reported; make another";
                return Err(Failure::new(PIXMIM_INTERNAL, why.into()));
            }
        };
        call::run(&model.context, stream, |call| {
            inner.enter(stream, call.dev)?;
            // They are lent to the caller, who may not give them back as an argument.
            call.claim("the model's gradients", model.grads.clone(), true)?;
            body(model, call, &mut inner)
        })
    })
}

/// Makes a model with freshly drawn weights. Allocates all memory of the training; on a GPU synchronises.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_create(
    context: *const pixmim_context,
    config: *const pixmim_model_config,
    out: *mut *mut pixmim_model,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it came from `pixmim_context_create`.
        let context = unsafe { pointee("context", context) }?;
        // SAFETY: the header asks of the caller that it leads to a config.
        let config = unsafe { pixmim_model_config::read(config) }?;
        // SAFETY: the header asks of the caller that it leads to a pointer, which nobody else uses.
        let out = unsafe { pointee_mut("out", out) }?;
        *out = Box::into_raw(Box::new(pixmim_model::new(context, config, |_| Ok(()))?));
        Ok(())
    })
}

/// As pixmim_model_create, with weights from disk: a checkpoint's folder (RUN/ckpt/step-..., which has moments and the count
/// of updates too), or a safetensors file of MAE's names in f32. `config` must have the sizes of the weights: let
/// pixmim_model_config_load fill them in. f32 and bf16 models only.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_load(
    context: *const pixmim_context,
    path: *const c_char,
    config: *const pixmim_model_config,
    out: *mut *mut pixmim_model,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it came from `pixmim_context_create`.
        let context = unsafe { pointee("context", context) }?;
        // SAFETY: the header asks of the caller that it leads to a config.
        let config = unsafe { pixmim_model_config::read(config) }?;
        // SAFETY: the header asks of the caller that it leads to a pointer, which nobody else uses.
        let out = unsafe { pointee_mut("out", out) }?;
        // SAFETY: the header asks of the caller that texts are ended by a zero byte.
        let mut saved = unsafe { Saved::open(path) }?;
        let model = pixmim_model::new(context, config, |trainer| {
            let loaded = match &mut saved {
                Saved::Checkpoint(checkpoint) => trainer.load_checkpoint(checkpoint),
                Saved::File(file) => trainer.load_weights(file),
            };
            loaded.map_err(of_file)
        })?;
        *out = Box::into_raw(Box::new(model));
        Ok(())
    })
}

/// Frees a model, once its work is done; the stream it was last used on must be alive. NULL is let pass.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_destroy(model: *mut pixmim_model) {
    guard(|| {
        if !model.is_null() && model.is_aligned() {
            // SAFETY: the header asks of the caller that it came from `pixmim_model_create` or `pixmim_model_load` and is not
            // used any more.
            let model = unsafe { Box::from_raw(model) };
            if let Ok(inner) = model.inner.lock() {
                inner.trainer.synchronize()?;
            }
        }
        Ok(())
    });
}

/// Writes the weights as a safetensors file, in place of what is at `path`: a reader sees the old file or the new one. Waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_save(
    model: *const pixmim_model,
    path: *const c_char,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, _, inner| {
        // SAFETY: the header asks of the caller that texts are ended by a zero byte.
        let path = Path::new(unsafe { utf8("path", path) }?);
        Ok(inner.trainer.save_weights(path, &inner.config)?)
    })
}

/// Draws masks, reads the images, and adds to the loss theirs over `micro_batches`, which are the calls of one step.
///
/// Reads images (bytes) u8, geometry (B, 6) i64 and samples (B) i64 as pixmim_input_forward and pixmim_random_masking_forward
/// do, and epoch (1) i64. Each may be in the host's memory or the device's; from the host geometry is checked, on a GPU nobody
/// looks at it. From the device nothing waits, and a stream being captured captures it if a call before had as many bytes of
/// images; the graph is good until a call has more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_forward_loss(
    model: *mut pixmim_model,
    images: *const pixmim_tensor,
    geometry: *const pixmim_tensor,
    samples: *const pixmim_tensor,
    epoch: *const pixmim_tensor,
    micro_batches: i64,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, call, inner| {
        let batch = Inputs {
            images: call.copy_from("images", images)?,
            geometry: call.copy_from("geometry", geometry)?,
            samples: call.copy_from("samples", samples)?,
            epoch: call.copy_from("epoch", epoch)?,
        };
        expect_dtype("images", batch.images.dtype(), DType::U8)?;
        expect_dtype("geometry", batch.geometry.dtype(), DType::I64)?;
        expect_dtype("samples", batch.samples.dtype(), DType::I64)?;
        expect_dtype("epoch", batch.epoch.dtype(), DType::I64)?;
        Ok(inner.trainer.forward_loss(batch, size("micro_batches", micro_batches)?)?)
    })
}

/// Adds the gradient of the loss that pixmim_model_forward_loss, which must have come right before, has added.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_backward(
    model: *mut pixmim_model,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, _, inner| Ok(inner.trainer.backward()?))
}

/// Updates the weights by the accumulated gradient, unless the loss, the gradient's norm or its square is not finite. The
/// gradient and the loss stay: pixmim_model_clear comes before the next step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_step(
    model: *mut pixmim_model,
    lr: f64,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, _, inner| {
        if !(0.0..=f64::from(f32::MAX)).contains(&lr) {
            return Err(Failure::invalid("lr", format!("is {lr:?}; it is 0 or more, and finite")));
        }
        Ok(inner.trainer.enqueue_update(TensorRef::new(&[lr], &[1])?)?)
    })
}

/// As pixmim_model_step, with the learning rate (1) f64 in the device's memory, or the host's: so that a captured step can
/// be replayed with another.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_step_with(
    model: *mut pixmim_model,
    lr: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, call, inner| {
        let lr = call.copy_from("lr", lr)?;
        expect_like("lr", lr.dtype(), lr.shape(), TensorRef::new(&[0f64], &[1])?)?;
        Ok(inner.trainer.enqueue_update(lr)?)
    })
}

/// Sets the gradients and the loss to zero: at the start of a step, or to give one up.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_clear(
    model: *mut pixmim_model,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, _, inner| Ok(inner.trainer.clear()?))
}

/// Waits, and tells the mean loss since pixmim_model_clear, and of the last step the gradient's norm before clipping and
/// whether the weights changed (1 or 0). What is NULL is not wanted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_outcome(
    model: *const pixmim_model,
    loss: *mut f64,
    grad_norm: *mut f64,
    updated: *mut i32,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, _, inner| {
        // SAFETY: the header asks of the caller that it is NULL or leads to a number, which nobody else uses.
        let loss = unsafe { wanted("loss", loss) }?;
        // SAFETY: as above.
        let grad_norm = unsafe { wanted("grad_norm", grad_norm) }?;
        // SAFETY: as above.
        let updated = unsafe { wanted("updated", updated) }?;
        let outcome = inner.trainer.outcome()?;
        loss.into_iter().for_each(|loss| *loss = outcome.loss);
        grad_norm.into_iter().for_each(|norm| *norm = outcome.grad_norm);
        updated.into_iter().for_each(|updated| *updated = outcome.updated.into());
        Ok(())
    })
}

/// Where something is to be written, unless it is not wanted.
///
/// # Safety
/// `out` is null, misaligned, or leads to a `T`, which nobody else uses.
unsafe fn wanted<'a, T>(name: &str, out: *mut T) -> Outcome<Option<&'a mut T>> {
    if out.is_null() {
        return Ok(None);
    }
    // SAFETY: promised by the caller.
    unsafe { pointee_mut(name, out) }.map(Some)
}
