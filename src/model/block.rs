//! One pre-norm transformer block: forward, then backward, mirrored.
//!
//! `middle = inp + proj(attention(qkv(norm1(inp))))`, `out = middle + fc2(gelu(fc1(norm2(middle))))`.
//!
//! Attention alone looks at several tokens. What comes before it ([`project`]) and after it ([`mix`]) works on any set of
//! rows, which the decoder makes use of: see [`super::decoder`].

use super::activations::{AfterAttention, BeforeAttention, BlockActivations, StackScratch};
use super::config::LAYER_NORM_EPS;
use super::params::{Block, Layer};
use crate::TensorList;
use crate::ops::{attention, layer_norm, linear};
use crate::{Device, Result, Tensor, TensorMut, TensorRef};

pub(super) fn forward(
    dev: &Device,
    weights: &TensorList,
    ids: &Block,
    inp: TensorRef<'_>,
    acts: &mut BlockActivations,
    workspace: &mut Tensor,
) -> Result<()> {
    project(dev, weights, ids, inp, &mut acts.before)?;
    attention::forward(
        dev,
        attention::Forward {
            out: acts.mixed.view_mut(),
            lse: acts.lse.view_mut(),
            qkv: acts.before.qkv.view(),
            workspace: workspace.view_mut(),
        },
    )?;
    mix(dev, weights, ids, inp, acts.mixed.view(), &mut acts.after)
}

/// From rows of the residual stream to their queries, keys and values.
pub(super) fn project(
    dev: &Device,
    weights: &TensorList,
    ids: &Block,
    inp: TensorRef<'_>,
    acts: &mut BeforeAttention,
) -> Result<()> {
    let w = |index: usize| weights.view(index);
    layer_norm::forward(
        dev,
        layer_norm::Forward {
            out: acts.norm.view_mut(),
            mean: acts.mean.view_mut(),
            rstd: acts.rstd.view_mut(),
            inp,
            weight: w(ids.norm1.weight),
            bias: w(ids.norm1.bias),
            eps: LAYER_NORM_EPS,
        },
    )?;
    linear::forward(
        dev,
        linear::Forward {
            out: acts.qkv.view_mut(),
            inp: acts.norm.view(),
            weight: w(ids.qkv.weight),
            bias: w(ids.qkv.bias),
            epilogue: linear::Epilogue::None,
        },
    )
}

/// From rows of the residual stream and attention's mixed values for them to the block's output.
pub(super) fn mix(
    dev: &Device,
    weights: &TensorList,
    ids: &Block,
    inp: TensorRef<'_>,
    mixed: TensorRef<'_>,
    acts: &mut AfterAttention,
) -> Result<()> {
    let w = |index: usize| weights.view(index);
    linear::forward(
        dev,
        linear::Forward {
            out: acts.middle.view_mut(),
            inp: mixed,
            weight: w(ids.proj.weight),
            bias: w(ids.proj.bias),
            epilogue: linear::Epilogue::Residual(inp),
        },
    )?;
    layer_norm::forward(
        dev,
        layer_norm::Forward {
            out: acts.norm.view_mut(),
            mean: acts.mean.view_mut(),
            rstd: acts.rstd.view_mut(),
            inp: acts.middle.view(),
            weight: w(ids.norm2.weight),
            bias: w(ids.norm2.bias),
            eps: LAYER_NORM_EPS,
        },
    )?;
    linear::forward(
        dev,
        linear::Forward {
            out: acts.hidden.view_mut(),
            inp: acts.norm.view(),
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

/// The weights, where their gradients go, and the workspace: what every part of a backward pass needs.
pub(super) struct Backward<'a> {
    pub(super) dev: &'a Device,
    pub(super) weights: &'a TensorList,
    pub(super) grads: &'a mut TensorList,
    pub(super) workspace: &'a mut Tensor,
}

impl Backward<'_> {
    /// Of [`forward`]. On entry `scratch.grad_stream` is the gradient of `out`, on return that of `inp`.
    pub(super) fn block(
        &mut self,
        ids: &Block,
        inp: TensorRef<'_>,
        acts: &BlockActivations,
        scratch: &mut StackScratch,
    ) -> Result<()> {
        let StackScratch { grad_stream, grad_branch, grad_qkv, grad_hidden } = scratch;
        let hidden = grad_hidden.view_mut();
        self.mix(
            ids,
            acts.mixed.view(),
            &acts.after,
            grad_stream.view_mut(),
            grad_branch.view_mut(),
            hidden,
        )?;
        attention::backward(
            self.dev,
            attention::Backward {
                grad_qkv: grad_qkv.view_mut(),
                grad_out: grad_branch.view(),
                out: acts.mixed.view(),
                lse: acts.lse.view(),
                qkv: acts.before.qkv.view(),
                workspace: self.workspace.view_mut(),
            },
        )?;
        let grad_norm = grad_branch.view_mut();
        self.project(ids, inp, &acts.before, grad_stream.view_mut(), grad_norm, grad_qkv.view())
    }

    /// Of [`mix`]. On entry `grad_stream` is the gradient of `acts.out`, on return that of the stream before; `grad_branch`
    /// becomes that of the mixed values.
    pub(super) fn mix(
        &mut self,
        ids: &Block,
        mixed: TensorRef<'_>,
        acts: &AfterAttention,
        mut grad_stream: TensorMut<'_>,
        mut grad_branch: TensorMut<'_>,
        mut grad_hidden: TensorMut<'_>,
    ) -> Result<()> {
        self.linear(
            ids.fc2,
            acts.hidden.view(),
            grad_stream.as_ref(),
            linear::GradInput::Gelu { grad: grad_hidden.reborrow(), pre: acts.pre_gelu.view() },
        )?;
        self.linear(
            ids.fc1,
            acts.norm.view(),
            grad_hidden.as_ref(),
            linear::GradInput::Plain(grad_branch.reborrow()),
        )?;
        // The stream's gradient becomes that of `middle`.
        self.norm(
            ids.norm2,
            Norm { inp: acts.middle.view(), mean: acts.mean.view(), rstd: acts.rstd.view() },
            grad_branch.as_ref(),
            grad_stream.reborrow(),
        )?;
        self.linear(ids.proj, mixed, grad_stream.as_ref(), linear::GradInput::Plain(grad_branch))
    }

    /// Of [`project`]. `grad_stream` becomes the gradient of `inp`; `grad_norm` is overwritten on the way.
    pub(super) fn project(
        &mut self,
        ids: &Block,
        inp: TensorRef<'_>,
        acts: &BeforeAttention,
        grad_stream: TensorMut<'_>,
        mut grad_norm: TensorMut<'_>,
        grad_qkv: TensorRef<'_>,
    ) -> Result<()> {
        self.linear(
            ids.qkv,
            acts.norm.view(),
            grad_qkv,
            linear::GradInput::Plain(grad_norm.reborrow()),
        )?;
        self.norm(
            ids.norm1,
            Norm { inp, mean: acts.mean.view(), rstd: acts.rstd.view() },
            grad_norm.as_ref(),
            grad_stream,
        )
    }

    /// Of a linear layer.
    pub(super) fn linear(
        &mut self,
        ids: Layer,
        inp: TensorRef<'_>,
        grad_out: TensorRef<'_>,
        grad_inp: linear::GradInput<'_>,
    ) -> Result<()> {
        let [grad_weight, grad_bias] = self.grads.views_mut([ids.weight, ids.bias]);
        linear::backward(
            self.dev,
            linear::Backward {
                grad_inp,
                grad_weight,
                grad_bias,
                grad_out,
                inp,
                weight: self.weights.view(ids.weight),
                workspace: self.workspace.view_mut(),
            },
        )
    }

    /// Of a layer norm. Adds to `grad_inp`.
    pub(super) fn norm(
        &mut self,
        ids: Layer,
        Norm { inp, mean, rstd }: Norm<'_>,
        grad_out: TensorRef<'_>,
        grad_inp: TensorMut<'_>,
    ) -> Result<()> {
        let [grad_weight, grad_bias] = self.grads.views_mut([ids.weight, ids.bias]);
        layer_norm::backward(
            self.dev,
            layer_norm::Backward {
                grad_inp,
                grad_weight,
                grad_bias,
                grad_out,
                inp,
                mean,
                rstd,
                weight: self.weights.view(ids.weight),
                workspace: self.workspace.view_mut(),
            },
        )
    }
}

/// What a layer norm keeps for its backward pass.
pub(super) struct Norm<'a> {
    pub(super) inp: TensorRef<'a>,
    pub(super) mean: TensorRef<'a>,
    pub(super) rstd: TensorRef<'a>,
}
