//! What a model holds, read and replaced from outside.

use std::ffi::{c_char, c_void};

use pixmim_core::{TensorList, TensorRef};

use super::{Model, pixmim_model, wanted, with};
use crate::status::{Failure, Outcome, guard, pixmim_status};
use crate::tensor::{Described, expect_like, pixmim_tensor, pointee, pointee_mut};

/// Of the state: a weight, f32 (f64 in a model of f64).
pub const PIXMIM_WEIGHT: i32 = 0;
/// Its accumulated gradient.
pub const PIXMIM_GRAD: i32 = 1;
/// Its first moment.
pub const PIXMIM_EXP_AVG: i32 = 2;
/// Its second moment.
pub const PIXMIM_EXP_AVG_SQ: i32 = 3;

/// Of the last forward pass: predicted patches (B, M, E), real, (row, column, channel).
pub const PIXMIM_PRED: i32 = 0;
/// What they were to be (B, M, E), wide, before norm_pix.
pub const PIXMIM_TARGET: i32 = 1;
/// Patches that the encoder saw (B, K) i32.
pub const PIXMIM_IDS_KEEP: i32 = 2;
/// Patches that were masked, and are predicted in this order (B, M) i32.
pub const PIXMIM_IDS_MASKED: i32 = 3;
/// Where each patch stands among kept and masked ones (B, L) i32.
pub const PIXMIM_IDS_RESTORE: i32 = 4;

impl Model {
    fn list(&mut self, kind: i32) -> Outcome<&mut TensorList> {
        let trainer = &mut self.trainer;
        match kind {
            PIXMIM_WEIGHT => Ok(&mut trainer.mae.weights),
            PIXMIM_GRAD => Ok(&mut trainer.grads),
            PIXMIM_EXP_AVG => Ok(&mut trainer.exp_avg),
            PIXMIM_EXP_AVG_SQ => Ok(&mut trainer.exp_avg_sq),
            _ => {
                let why = format!("is {kind}; it is PIXMIM_WEIGHT to PIXMIM_EXP_AVG_SQ, 0 to 3");
                Err(Failure::invalid("kind", why))
            }
        }
    }

    fn output(&self, which: i32) -> Outcome<TensorRef<'_>> {
        let acts = self.trainer.activations();
        let tensor = match which {
            PIXMIM_PRED => &acts.pred,
            PIXMIM_TARGET => self.trainer.target(),
            PIXMIM_IDS_KEEP => &acts.ids_keep,
            PIXMIM_IDS_MASKED => &acts.ids_predicted,
            PIXMIM_IDS_RESTORE => &acts.ids_restore,
            _ => {
                let why = format!("is {which}; it is PIXMIM_PRED to PIXMIM_IDS_RESTORE, 0 to 4");
                return Err(Failure::invalid("which", why));
            }
        };
        Ok(tensor.view())
    }
}

impl pixmim_model {
    fn index(&self, index: i64) -> Outcome<usize> {
        let last = self.weights.len() - 1;
        let found = usize::try_from(index).ok().filter(|&index| index <= last);
        found.ok_or_else(|| {
            Failure::invalid("index", format!("is {index}; it lies between 0 and {last}"))
        })
    }
}

/// Writes the number of weights.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_state_count(
    model: *const pixmim_model,
    count: *mut i64,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it came from `pixmim_model_create` or `pixmim_model_load`.
        let model = unsafe { pointee("model", model) }?;
        // SAFETY: the header asks of the caller that it leads to a number, which nobody else uses.
        *unsafe { pointee_mut("count", count) }? = model.weights.len() as i64;
        Ok(())
    })
}

/// Tells of a weight, and of its gradient and moments: its name, as MAE has it, which lives as long as the model; and a
/// tensor of its shape and dtype on the model's device, to which only data is lacking. What is NULL is not wanted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_state_info(
    model: *const pixmim_model,
    index: i64,
    name: *mut *const c_char,
    like: *mut pixmim_tensor,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it came from `pixmim_model_create` or `pixmim_model_load`.
        let model = unsafe { pointee("model", model) }?;
        let (text, tensor) = &model.weights[model.index(index)?];
        // SAFETY: the header asks of the caller that it is NULL or leads to a pointer, which nobody else uses.
        let name = unsafe { wanted("name", name) }?;
        // SAFETY: the header asks of the caller that it is NULL or leads to a tensor, which nobody else uses.
        let like = unsafe { wanted("like", like) }?;
        name.into_iter().for_each(|name| *name = text.as_ptr());
        like.into_iter().for_each(|like| *like = *tensor);
        Ok(())
    })
}

/// Copies a tensor of the state to `out`, of its dtype and shape. To the host it waits; to the device it does not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_state_get(
    model: *const pixmim_model,
    kind: i32,
    index: i64,
    out: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |model, call, inner| {
        let (index, out) = (model.index(index)?, call.copy_to("out", out)?);
        let from = inner.list(kind)?.view(index);
        expect_like("out", out.dtype(), out.shape(), from)?;
        Ok(call.dev.copy(out, from)?)
    })
}

/// Replaces a tensor of the state by `inp`, of its dtype and shape, on the host or the device. A weight's rounded copy
/// follows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_state_set(
    model: *mut pixmim_model,
    kind: i32,
    index: i64,
    inp: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |model, call, inner| {
        let (index, inp) = (model.index(index)?, call.copy_from("inp", inp)?);
        expect_like("inp", inp.dtype(), inp.shape(), inner.list(kind)?.view(index))?;
        if kind == PIXMIM_WEIGHT {
            return Ok(inner.trainer.mae.set_weight(call.dev, index, inp)?);
        }
        let [into] = inner.list(kind)?.views_mut([index]);
        Ok(call.dev.copy(into, inp)?)
    })
}

/// Lends all gradients as one vector in the model's memory, with zeros between them, until the model is destroyed: to sum
/// them over processes between pixmim_model_backward and pixmim_model_step, say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_grads(
    model: *mut pixmim_model,
    out: *mut pixmim_tensor,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it came from `pixmim_model_create` or `pixmim_model_load`.
        let model = unsafe { pointee("model", model) }?;
        // SAFETY: the header asks of the caller that it leads to a tensor, which nobody else uses.
        *unsafe { pointee_mut("out", out) }? = model.grads.lent();
        Ok(())
    })
}

/// Writes the number of updates done, which Adam's bias correction counts. Waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_updates_get(
    model: *const pixmim_model,
    updates: *mut i64,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, _, inner| {
        // SAFETY: the header asks of the caller that it leads to a number, which nobody else uses.
        *unsafe { pointee_mut("updates", updates) }? = inner.trainer.updates()?.cast_signed();
        Ok(())
    })
}

/// Sets the number of updates done, 0 or more: to go on from a state that was kept elsewhere.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_updates_set(
    model: *mut pixmim_model,
    updates: i64,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, _, inner| {
        let updates = u64::try_from(updates)
            .map_err(|_| Failure::invalid("updates", format!("is {updates}; it is 0 or more")))?;
        Ok(inner.trainer.set_updates(updates)?)
    })
}

/// Tells shape and dtype of PIXMIM_PRED and so on, as pixmim_model_state_info does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_output_info(
    model: *const pixmim_model,
    which: i32,
    like: *mut pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |model, _, inner| {
        let found = Described::of(inner.output(which)?, model.context.device);
        // SAFETY: the header asks of the caller that it leads to a tensor, which nobody else uses.
        let like = unsafe { pointee_mut("like", like) }?;
        *like = pixmim_tensor { data: std::ptr::null_mut(), ..found.lent() };
        Ok(())
    })
}

/// Copies PIXMIM_PRED and so on of the last pixmim_model_forward_loss to `out`, of their dtype and shape: for pictures. To the
/// host it waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_model_output_get(
    model: *const pixmim_model,
    which: i32,
    out: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    with(model, stream, |_, call, inner| {
        let (out, from) = (call.copy_to("out", out)?, inner.output(which)?);
        expect_like("out", out.dtype(), out.shape(), from)?;
        Ok(call.dev.copy(out, from)?)
    })
}
