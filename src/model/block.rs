//! One pre-norm transformer block: forward, then backward, mirrored.
//!
//! `middle = inp + proj(attention(qkv(norm1(inp))))`, `out = middle + fc2(gelu(fc1(norm2(middle))))`.

use super::activations::{BlockActivations, StackScratch};
use super::config::LAYER_NORM_EPS;
use super::params::Block;
use crate::TensorList;
use crate::ops::{attention, layer_norm, linear};
use crate::{Device, Result, Tensor, TensorRef};

pub(super) fn forward(
    dev: &Device,
    weights: &TensorList,
    ids: &Block,
    inp: TensorRef<'_>,
    acts: &mut BlockActivations,
    workspace: &mut Tensor,
) -> Result<()> {
    let w = |index: usize| weights.view(index);
    layer_norm::forward(
        dev,
        layer_norm::Forward {
            out: acts.norm1.view_mut(),
            mean: acts.mean1.view_mut(),
            rstd: acts.rstd1.view_mut(),
            inp,
            select: None,
            weight: w(ids.norm1.weight),
            bias: w(ids.norm1.bias),
            eps: LAYER_NORM_EPS,
        },
    )?;
    linear::forward(
        dev,
        linear::Forward {
            out: acts.qkv.view_mut(),
            inp: acts.norm1.view(),
            weight: w(ids.qkv.weight),
            bias: w(ids.qkv.bias),
            epilogue: linear::Epilogue::None,
        },
    )?;
    attention::forward(
        dev,
        attention::Forward {
            out: acts.mixed.view_mut(),
            lse: acts.lse.view_mut(),
            qkv: acts.qkv.view(),
            workspace: workspace.view_mut(),
        },
    )?;
    linear::forward(
        dev,
        linear::Forward {
            out: acts.middle.view_mut(),
            inp: acts.mixed.view(),
            weight: w(ids.proj.weight),
            bias: w(ids.proj.bias),
            epilogue: linear::Epilogue::Residual(inp),
        },
    )?;
    layer_norm::forward(
        dev,
        layer_norm::Forward {
            out: acts.norm2.view_mut(),
            mean: acts.mean2.view_mut(),
            rstd: acts.rstd2.view_mut(),
            inp: acts.middle.view(),
            select: None,
            weight: w(ids.norm2.weight),
            bias: w(ids.norm2.bias),
            eps: LAYER_NORM_EPS,
        },
    )?;
    linear::forward(
        dev,
        linear::Forward {
            out: acts.hidden.view_mut(),
            inp: acts.norm2.view(),
            weight: w(ids.fc1.weight),
            bias: w(ids.fc1.bias),
            epilogue: linear::Epilogue::Gelu(acts.pre_gelu.view_mut()),
        },
    )?;
    linear::forward(
        dev,
        linear::Forward {
            out: acts.out.view_mut(),
            inp: acts.hidden.view(),
            weight: w(ids.fc2.weight),
            bias: w(ids.fc2.bias),
            epilogue: linear::Epilogue::Residual(acts.middle.view()),
        },
    )
}

/// On entry `scratch.grad_stream` is the gradient of `out`, on return that of `inp`.
#[expect(clippy::too_many_arguments, reason = "the forward pass's, and where gradients go")]
pub(super) fn backward(
    dev: &Device,
    weights: &TensorList,
    grads: &mut TensorList,
    ids: &Block,
    inp: TensorRef<'_>,
    acts: &BlockActivations,
    scratch: &mut StackScratch,
    workspace: &mut Tensor,
) -> Result<()> {
    let w = |index: usize| weights.view(index);
    let StackScratch { grad_stream, grad_branch, grad_qkv, grad_hidden } = scratch;
    // fc2, and GELU before it.
    let [grad_weight, grad_bias] = grads.views_mut([ids.fc2.weight, ids.fc2.bias]);
    linear::backward(
        dev,
        linear::Backward {
            grad_inp: linear::GradInput::Gelu {
                grad: grad_hidden.view_mut(),
                pre: acts.pre_gelu.view(),
            },
            grad_weight,
            grad_bias,
            grad_out: grad_stream.view(),
            inp: acts.hidden.view(),
            weight: w(ids.fc2.weight),
            workspace: workspace.view_mut(),
        },
    )?;
    // fc1.
    let [grad_weight, grad_bias] = grads.views_mut([ids.fc1.weight, ids.fc1.bias]);
    linear::backward(
        dev,
        linear::Backward {
            grad_inp: linear::GradInput::Plain(grad_branch.view_mut()),
            grad_weight,
            grad_bias,
            grad_out: grad_hidden.view(),
            inp: acts.norm2.view(),
            weight: w(ids.fc1.weight),
            workspace: workspace.view_mut(),
        },
    )?;
    // norm2; the stream's gradient becomes that of `middle`.
    let [grad_weight, grad_bias] = grads.views_mut([ids.norm2.weight, ids.norm2.bias]);
    layer_norm::backward(
        dev,
        layer_norm::Backward {
            grad_inp: grad_stream.view_mut(),
            grad_weight,
            grad_bias,
            grad_out: grad_branch.view(),
            inp: acts.middle.view(),
            select: None,
            mean: acts.mean2.view(),
            rstd: acts.rstd2.view(),
            weight: w(ids.norm2.weight),
            workspace: workspace.view_mut(),
        },
    )?;
    // proj.
    let [grad_weight, grad_bias] = grads.views_mut([ids.proj.weight, ids.proj.bias]);
    linear::backward(
        dev,
        linear::Backward {
            grad_inp: linear::GradInput::Plain(grad_branch.view_mut()),
            grad_weight,
            grad_bias,
            grad_out: grad_stream.view(),
            inp: acts.mixed.view(),
            weight: w(ids.proj.weight),
            workspace: workspace.view_mut(),
        },
    )?;
    attention::backward(
        dev,
        attention::Backward {
            grad_qkv: grad_qkv.view_mut(),
            grad_out: grad_branch.view(),
            out: acts.mixed.view(),
            lse: acts.lse.view(),
            qkv: acts.qkv.view(),
            workspace: workspace.view_mut(),
        },
    )?;
    // qkv.
    let [grad_weight, grad_bias] = grads.views_mut([ids.qkv.weight, ids.qkv.bias]);
    linear::backward(
        dev,
        linear::Backward {
            grad_inp: linear::GradInput::Plain(grad_branch.view_mut()),
            grad_weight,
            grad_bias,
            grad_out: grad_qkv.view(),
            inp: acts.norm1.view(),
            weight: w(ids.qkv.weight),
            workspace: workspace.view_mut(),
        },
    )?;
    // norm1; the stream's gradient becomes that of `inp`.
    let [grad_weight, grad_bias] = grads.views_mut([ids.norm1.weight, ids.norm1.bias]);
    layer_norm::backward(
        dev,
        layer_norm::Backward {
            grad_inp: grad_stream.view_mut(),
            grad_weight,
            grad_bias,
            grad_out: grad_branch.view(),
            inp,
            select: None,
            mean: acts.mean1.view(),
            rstd: acts.rstd1.view(),
            weight: w(ids.norm1.weight),
            workspace: workspace.view_mut(),
        },
    )
}
