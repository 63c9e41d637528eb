//! The ops of a vision transformer and its optimizer.

use std::ffi::c_void;

use pixmim_core::ops::linear::{Epilogue, GradInput};
use pixmim_core::ops::{adamw, attention, cast, gelu, grad_norm, layer_norm, linear};

use crate::call::call;
use crate::context::pixmim_context;
use crate::status::{Failure, pixmim_status};
use crate::tensor::pixmim_tensor;

/// Layer normalization of rows, as torch.nn.LayerNorm.
///
/// Writes out (.., D), real, mean and rstd (..), wide. Reads inp (.., D), weight (D) and bias (D), real. On a GPU D is a
/// multiple of 8, at most 8192.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_layer_norm_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    mean: *const pixmim_tensor,
    rstd: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    weight: *const pixmim_tensor,
    bias: *const pixmim_tensor,
    eps: f64,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = layer_norm::Forward {
            out: call.write("out", out)?,
            mean: call.write("mean", mean)?,
            rstd: call.write("rstd", rstd)?,
            inp: call.read("inp", inp)?,
            weight: call.read("weight", weight)?,
            bias: call.read("bias", bias)?,
            eps,
        };
        Ok(layer_norm::forward(call.dev, args)?)
    })
}

/// Gradients of pixmim_layer_norm_forward.
///
/// Adds to grad_inp (.., D), real, as that is the residual stream's, and to grad_weight (D) and grad_bias (D), wide. Reads
/// grad_out (.., D), inp (.., D), weight (D), real, mean and rstd (..), wide, from forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_layer_norm_backward(
    context: *const pixmim_context,
    grad_inp: *const pixmim_tensor,
    grad_weight: *const pixmim_tensor,
    grad_bias: *const pixmim_tensor,
    grad_out: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    mean: *const pixmim_tensor,
    rstd: *const pixmim_tensor,
    weight: *const pixmim_tensor,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let of = call.describe("inp", inp)?;
        let needed = layer_norm::workspace_bytes(call.dev, of.dtype, of.rows(), of.width());
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = layer_norm::Backward {
            grad_inp: call.write("grad_inp", grad_inp)?,
            grad_weight: call.write("grad_weight", grad_weight)?,
            grad_bias: call.write("grad_bias", grad_bias)?,
            grad_out: call.read("grad_out", grad_out)?,
            inp: call.read("inp", inp)?,
            mean: call.read("mean", mean)?,
            rstd: call.read("rstd", rstd)?,
            weight: call.read("weight", weight)?,
            workspace,
        };
        Ok(layer_norm::backward(call.dev, args)?)
    })
}

/// Self-attention over packed queries, keys and values: softmax(q k^T / sqrt(D / NH)) v, unmasked, without dropout.
///
/// Writes out (B, T, D), real, and lse (B, NH, T), wide, which backward reads and which says the number of heads. Reads qkv
/// (B, T, 3 D), real, as timm packs it: (3, NH, D / NH) in each row. On a GPU T is at most 1024, D / NH 8 to 128.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_attention_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    lse: *const pixmim_tensor,
    qkv: *const pixmim_tensor,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let (of, rows) = (call.describe("qkv", qkv)?, call.describe("lse", lse)?);
        let [images, tokens, heads] = [of.dim(0), of.dim(1), rows.dim(1)];
        let needed = attention::workspace_bytes(call.dev, of.dtype, images, tokens, heads);
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = attention::Forward {
            out: call.write("out", out)?,
            lse: call.write("lse", lse)?,
            qkv: call.read("qkv", qkv)?,
            workspace,
        };
        Ok(attention::forward(call.dev, args)?)
    })
}

/// Gradient of pixmim_attention_forward.
///
/// Writes grad_qkv (B, T, 3 D). Reads grad_out (B, T, D), out and lse from forward, and qkv (B, T, 3 D).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_attention_backward(
    context: *const pixmim_context,
    grad_qkv: *const pixmim_tensor,
    grad_out: *const pixmim_tensor,
    out: *const pixmim_tensor,
    lse: *const pixmim_tensor,
    qkv: *const pixmim_tensor,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let (of, rows) = (call.describe("qkv", qkv)?, call.describe("lse", lse)?);
        let [images, tokens, heads] = [of.dim(0), of.dim(1), rows.dim(1)];
        let needed = attention::workspace_bytes(call.dev, of.dtype, images, tokens, heads);
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = attention::Backward {
            grad_qkv: call.write("grad_qkv", grad_qkv)?,
            grad_out: call.read("grad_out", grad_out)?,
            out: call.read("out", out)?,
            lse: call.read("lse", lse)?,
            qkv: call.read("qkv", qkv)?,
            workspace,
        };
        Ok(attention::backward(call.dev, args)?)
    })
}

/// A fully connected layer: inp weight^T + bias, then GELU, or with a residual added.
///
/// Writes out (.., N). Reads inp (.., K), weight (N, K), bias (N). With pre (.., N): out is gelu of the product and its
/// bias, and pre, which is written, is what GELU was given. With residual (.., N): it is added. Either or both are NULL. All
/// real.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_linear_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    pre: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    weight: *const pixmim_tensor,
    bias: *const pixmim_tensor,
    residual: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let epilogue = match (pre.is_null(), residual.is_null()) {
            (true, true) => Epilogue::None,
            (false, true) => Epilogue::Gelu(call.write("pre", pre)?),
            (true, false) => Epilogue::Residual(call.read("residual", residual)?),
            (false, false) => {
                let why = "and `residual` are both given; one layer does the one or the other";
                return Err(Failure::invalid("pre", why));
            }
        };
        let args = linear::Forward {
            out: call.write("out", out)?,
            inp: call.read("inp", inp)?,
            weight: call.read("weight", weight)?,
            bias: call.read("bias", bias)?,
            epilogue,
        };
        Ok(linear::forward(call.dev, args)?)
    })
}

/// Gradients of the product and its bias in pixmim_linear_forward.
///
/// Writes grad_inp (.., K), real, unless it is NULL; with pre (.., K), what GELU was given in the layer before, it is the
/// gradient of pre. Adds to grad_weight (N, K) and grad_bias (N), wide. Reads grad_out (.., N), inp (.., K), weight (N, K),
/// real.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_linear_backward(
    context: *const pixmim_context,
    grad_inp: *const pixmim_tensor,
    grad_weight: *const pixmim_tensor,
    grad_bias: *const pixmim_tensor,
    grad_out: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    weight: *const pixmim_tensor,
    pre: *const pixmim_tensor,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let of = call.describe("grad_out", grad_out)?;
        let needed = linear::workspace_bytes(call.dev, of.rows(), of.width());
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let grad_inp = match (grad_inp.is_null(), pre.is_null()) {
            (true, true) => GradInput::None,
            (false, true) => GradInput::Plain(call.write("grad_inp", grad_inp)?),
            (false, false) => GradInput::Gelu {
                grad: call.write("grad_inp", grad_inp)?,
                pre: call.read("pre", pre)?,
            },
            (true, false) => {
                return Err(Failure::invalid("grad_inp", "is NULL, but `pre` asks for it"));
            }
        };
        let args = linear::Backward {
            grad_inp,
            grad_weight: call.write("grad_weight", grad_weight)?,
            grad_bias: call.write("grad_bias", grad_bias)?,
            grad_out: call.read("grad_out", grad_out)?,
            inp: call.read("inp", inp)?,
            weight: call.read("weight", weight)?,
            workspace,
        };
        Ok(linear::backward(call.dev, args)?)
    })
}

/// GELU in its exact form. Writes out, reads inp: any one shape, real.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_gelu_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = gelu::Forward { out: call.write("out", out)?, inp: call.read("inp", inp)? };
        Ok(gelu::forward(call.dev, args)?)
    })
}

/// Gradient of pixmim_gelu_forward. Writes grad_inp, reads grad_out and inp: any one shape, real.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_gelu_backward(
    context: *const pixmim_context,
    grad_inp: *const pixmim_tensor,
    grad_out: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = gelu::Backward {
            grad_inp: call.write("grad_inp", grad_inp)?,
            grad_out: call.read("grad_out", grad_out)?,
            inp: call.read("inp", inp)?,
        };
        Ok(gelu::backward(call.dev, args)?)
    })
}

/// L2 norm of all gradients. Writes norm (1), not finite if any gradient is not; reads grad (N), both wide.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_grad_norm_forward(
    context: *const pixmim_context,
    norm: *const pixmim_tensor,
    grad: *const pixmim_tensor,
    workspace: *mut c_void,
    workspace_bytes: *mut usize,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let of = call.describe("grad", grad)?;
        let needed = grad_norm::workspace_bytes(call.dev, of.elems());
        let Some(workspace) = call.workspace(workspace, workspace_bytes, needed)? else {
            return Ok(());
        };
        let args = grad_norm::Forward {
            norm: call.write("norm", norm)?,
            grad: call.read("grad", grad)?,
            workspace,
        };
        Ok(grad_norm::forward(call.dev, args)?)
    })
}

/// Decides whether a step of AdamW is taken, counts it, and works out what is the same for all parameters.
///
/// Writes coefficients (5), wide. Counts up step (1) i64 if the step is taken: if loss, grad_norm and its square are finite.
/// Reads lr (1) f64, loss (1) and grad_norm (1), wide. `clip`: gradients are scaled down to this norm; 0: never.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_adamw_prepare(
    context: *const pixmim_context,
    coefficients: *const pixmim_tensor,
    step: *const pixmim_tensor,
    lr: *const pixmim_tensor,
    loss: *const pixmim_tensor,
    grad_norm: *const pixmim_tensor,
    clip: f64,
    beta1: f64,
    beta2: f64,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = adamw::Prepare {
            coefficients: call.write("coefficients", coefficients)?,
            step: call.write("step", step)?,
            lr: call.read("lr", lr)?,
            loss: call.read("loss", loss)?,
            grad_norm: call.read("grad_norm", grad_norm)?,
            clip,
            betas: [beta1, beta2],
        };
        Ok(adamw::prepare(call.dev, args)?)
    })
}

/// One update of parameters by AdamW, as torch.optim.AdamW; nothing changes if the step is not taken.
///
/// Updates param, exp_avg and exp_avg_sq (N), wide, and writes copy (N) bf16, param rounded, unless it is NULL. Reads grad
/// (N), wide, and coefficients (5) from pixmim_adamw_prepare.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_adamw_update(
    context: *const pixmim_context,
    param: *const pixmim_tensor,
    copy: *const pixmim_tensor,
    exp_avg: *const pixmim_tensor,
    exp_avg_sq: *const pixmim_tensor,
    grad: *const pixmim_tensor,
    coefficients: *const pixmim_tensor,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = adamw::Update {
            param: call.write("param", param)?,
            copy: (!copy.is_null()).then(|| call.write("copy", copy)).transpose()?,
            exp_avg: call.write("exp_avg", exp_avg)?,
            exp_avg_sq: call.write("exp_avg_sq", exp_avg_sq)?,
            grad: call.read("grad", grad)?,
            coefficients: call.read("coefficients", coefficients)?,
            betas: [beta1, beta2],
            eps,
            weight_decay,
        };
        Ok(adamw::update(call.dev, args)?)
    })
}

/// From f32 to bf16 or back, to nearest, ties to even. Writes out, reads inp: any one shape.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_cast_forward(
    context: *const pixmim_context,
    out: *const pixmim_tensor,
    inp: *const pixmim_tensor,
    stream: *mut c_void,
) -> pixmim_status {
    call(context, stream, |call| {
        let args = cast::Forward { out: call.write("out", out)?, inp: call.read("inp", inp)? };
        Ok(cast::forward(call.dev, args)?)
    })
}
