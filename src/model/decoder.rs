//! The decoder, without the work whose result nobody sees: forward, then backward, mirrored.
//!
//! * What stands at a masked patch before the first attention depends on its position alone. So the first block's layer norm,
//!   queries, keys and values are computed for the kept tokens of each image and *once* for the mask token at each
//!   position: `B (1 + K) + L` rows in place of `B (1 + L)`.
//! * The loss sees the predicted patches only. So after the last attention, which needs all tokens, only these go on.
//!
//! Both leave every number as it is.

use super::activations::{Activations, BlockActivations, PredictedScratch, RowsScratch, Scratch};
use super::block::{self, Norm};
use super::config::LAYER_NORM_EPS;
use super::params::Table;
use crate::ops::{add_positions, attention, gather_tokens, layer_norm, linear, restore_tokens};
use crate::profile::stage;
use crate::{Device, Result, Tensor, TensorList, TensorRef};

/// From `acts.embedded` and the ids to `acts.pred`.
pub(super) fn forward(
    dev: &Device,
    weights: &TensorList,
    table: &Table,
    pos_embed: TensorRef<'_>,
    acts: &mut Activations,
    workspace: &mut Tensor,
) -> Result<()> {
    let w = |index: usize| weights.view(index);
    let &[images, short, dim] = acts.embedded.shape() else { unreachable!("(B, 1 + K, Dd)") };
    let kept = images * short;
    add_positions::forward(
        dev,
        add_positions::Forward {
            out: acts.decoder_rows.view_mut(),
            inp: acts.embedded.view(),
            ids_keep: acts.ids_keep.view(),
            mask_token: w(table.mask_token).reshaped(&[dim])?,
            pos_embed,
        },
    )?;
    let (inp, fill) = acts.decoder_rows.view().split_at(kept);
    restore_tokens::forward(
        dev,
        restore_tokens::Forward {
            out: acts.decoder_tokens.view_mut(),
            inp: inp.reshaped(&[images, short, dim])?,
            fill,
            ids_restore: acts.ids_restore.view(),
        },
    )?;
    let count = acts.decoder_blocks.len();
    for (l, ids) in table.decoder_blocks.iter().enumerate() {
        let _block = stage("block", l);
        let (done, rest) = acts.decoder_blocks.split_at_mut(l);
        let (stream, acts_l) = (stream(done, &acts.decoder_tokens).view(), &mut rest[0]);
        let qkv = if l == 0 {
            let rows = acts.decoder_rows.view().reshaped(acts_l.before.norm.shape())?;
            block::project(dev, weights, ids, rows, &mut acts_l.before)?;
            let rows =
                acts_l.before.qkv.view().reshaped(&[acts.decoder_rows.shape()[0], 3 * dim])?;
            let (inp, fill) = rows.split_at(kept);
            restore_tokens::forward(
                dev,
                restore_tokens::Forward {
                    out: acts.decoder_qkv.view_mut(),
                    inp: inp.reshaped(&[images, short, 3 * dim])?,
                    fill,
                    ids_restore: acts.ids_restore.view(),
                },
            )?;
            acts.decoder_qkv.view()
        } else {
            block::project(dev, weights, ids, stream, &mut acts_l.before)?;
            acts_l.before.qkv.view()
        };
        attention::forward(
            dev,
            attention::Forward {
                out: acts_l.mixed.view_mut(),
                lse: acts_l.lse.view_mut(),
                qkv,
                workspace: workspace.view_mut(),
            },
        )?;
        let (stream, mixed) = if l + 1 == count {
            for (out, inp) in
                [(&mut acts.last_stream, stream), (&mut acts.last_mixed, acts_l.mixed.view())]
            {
                let (out, ids_masked) = (out.view_mut(), acts.ids_predicted.view());
                gather_tokens::forward(dev, gather_tokens::Forward { out, inp, ids_masked })?;
            }
            (acts.last_stream.view(), acts.last_mixed.view())
        } else {
            (stream, acts_l.mixed.view())
        };
        block::mix(dev, weights, ids, stream, mixed, &mut acts_l.after)?;
    }
    layer_norm::forward(
        dev,
        layer_norm::Forward {
            out: acts.decoded.view_mut(),
            mean: acts.decoded_mean.view_mut(),
            rstd: acts.decoded_rstd.view_mut(),
            inp: stream(&acts.decoder_blocks, &acts.decoder_tokens).view(),
            weight: w(table.decoder_norm.weight),
            bias: w(table.decoder_norm.bias),
            eps: LAYER_NORM_EPS,
        },
    )?;
    linear::forward(
        dev,
        linear::Forward {
            out: acts.pred.view_mut(),
            inp: acts.decoded.view(),
            weight: w(table.decoder_pred.weight),
            bias: w(table.decoder_pred.bias),
            epilogue: linear::Epilogue::None,
        },
    )
}

impl block::Backward<'_> {
    /// Of [`forward`]: from `scratch.grad_pred` to the gradient of `acts.embedded`, which are the first rows of
    /// `scratch.rows.grad_stream`.
    pub(super) fn decoder(
        &mut self,
        table: &Table,
        acts: &Activations,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Scratch { grad_pred, predicted, decoder, rows, .. } = scratch;
        let &[images, short, dim] = acts.embedded.shape() else { unreachable!("(B, 1 + K, Dd)") };
        let kept = images * short;
        self.linear(
            table.decoder_pred,
            acts.decoded.view(),
            grad_pred.view(),
            linear::GradInput::Plain(predicted.grad_branch.view_mut()),
        )?;
        self.dev.clear(predicted.grad_stream.view_mut())?;
        self.norm(
            table.decoder_norm,
            Norm {
                inp: stream(&acts.decoder_blocks, &acts.decoder_tokens).view(),
                mean: acts.decoded_mean.view(),
                rstd: acts.decoded_rstd.view(),
            },
            predicted.grad_branch.view(),
            predicted.grad_stream.view_mut(),
        )?;
        let count = acts.decoder_blocks.len();
        for (l, ids) in table.decoder_blocks.iter().enumerate().rev() {
            let _block = stage("block", l);
            let inp = stream(&acts.decoder_blocks[..l], &acts.decoder_tokens).view();
            let acts_l = &acts.decoder_blocks[l];
            if l + 1 == count {
                let PredictedScratch { grad_stream, grad_branch, grad_hidden } = predicted;
                self.mix(
                    ids,
                    acts.last_mixed.view(),
                    &acts_l.after,
                    grad_stream.view_mut(),
                    grad_branch.view_mut(),
                    grad_hidden.view_mut(),
                )?;
                for (grad_inp, grad_out) in [
                    (&mut decoder.grad_stream, grad_stream.view()),
                    (&mut decoder.grad_branch, grad_branch.view()),
                ] {
                    let (grad_inp, ids_restore) = (grad_inp.view_mut(), acts.ids_restore.view());
                    let args = gather_tokens::Backward { grad_inp, grad_out, ids_restore };
                    gather_tokens::backward(self.dev, args)?;
                }
            } else {
                self.mix(
                    ids,
                    acts_l.mixed.view(),
                    &acts_l.after,
                    decoder.grad_stream.view_mut(),
                    decoder.grad_branch.view_mut(),
                    decoder.grad_hidden.view_mut(),
                )?;
            }
            let qkv = if l == 0 { &acts.decoder_qkv } else { &acts_l.before.qkv };
            attention::backward(
                self.dev,
                attention::Backward {
                    grad_qkv: decoder.grad_qkv.view_mut(),
                    grad_out: decoder.grad_branch.view(),
                    out: acts_l.mixed.view(),
                    lse: acts_l.lse.view(),
                    qkv: qkv.view(),
                    workspace: self.workspace.view_mut(),
                },
            )?;
            if l > 0 {
                let (grad_stream, grad_norm) =
                    (decoder.grad_stream.view_mut(), decoder.grad_branch.view_mut());
                let grad_qkv = decoder.grad_qkv.view();
                self.project(ids, inp, &acts_l.before, grad_stream, grad_norm, grad_qkv)?;
                continue;
            }
            let RowsScratch { grad_stream, grad_norm, grad_qkv } = rows;
            for (grad_rows, grad_out, width) in [
                (&mut *grad_stream, decoder.grad_stream.view(), dim),
                (&mut *grad_qkv, decoder.grad_qkv.view(), 3 * dim),
            ] {
                let (grad_inp, grad_fill) = grad_rows.view_mut().split_at(kept);
                restore_tokens::backward(
                    self.dev,
                    restore_tokens::Backward {
                        grad_inp: grad_inp.reshaped(&[images, short, width])?,
                        grad_fill,
                        grad_out,
                        ids_restore: acts.ids_restore.view(),
                    },
                )?;
            }
            let shape = acts_l.before.norm.shape();
            self.project(
                ids,
                acts.decoder_rows.view().reshaped(shape)?,
                &acts_l.before,
                grad_stream.view_mut().reshaped(shape)?,
                grad_norm.view_mut().reshaped(shape)?,
                grad_qkv.view(),
            )?;
        }
        let (_, grad_fill) = rows.grad_stream.view().split_at(kept);
        let [grad_mask_token] = self.grads.views_mut([table.mask_token]);
        add_positions::backward(
            self.dev,
            add_positions::Backward {
                grad_mask_token: grad_mask_token.reshaped(&[dim])?,
                grad_fill,
                workspace: self.workspace.view_mut(),
            },
        )
    }
}

/// The residual stream after the last of `blocks`, or before the first.
pub(super) fn stream<'a>(blocks: &'a [BlockActivations], tokens: &'a Tensor) -> &'a Tensor {
    blocks.last().map_or(tokens, |block| &block.after.out)
}
