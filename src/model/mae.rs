//! The masked autoencoder (He et al. 2021, arXiv:2111.06377): forward, then backward, mirrored.

use super::activations::{Activations, Batch, Scratch};
use super::config::LAYER_NORM_EPS;
use super::params::{self, Table};
use super::{MaeConfig, block, pos_embed};
use crate::ops::{add_positions, cast, layer_norm, linear, patch_embed, restore_tokens};
use crate::{Arena, DType, Device, Result, Tensor, TensorList, TensorMut, TensorRef};

/// Tokens before the first patch: the class token.
const PREFIX: usize = 1;

/// Sizes, parameters and fixed positions of a masked autoencoder.
#[derive(Debug)]
pub struct Mae {
    config: MaeConfig,
    dtype: DType,
    table: Table,
    /// Trainable tensors, in the order of [`Mae::table`], in f32 or f64: what the optimizer updates.
    pub weights: TensorList,
    /// The weights rounded to bf16, at the same places, where the network computes in bf16.
    pub rounded: Option<TensorList>,
    /// `(1 + L, D)`, fixed.
    pub pos_embed: Tensor,
    /// `(1 + L, Dd)`, fixed.
    pub decoder_pos_embed: Tensor,
}

impl Mae {
    /// A network with freshly drawn weights.
    ///
    /// # Errors
    /// As [`MaeConfig::check`]; [`crate::Error::OutOfMemory`].
    pub fn new(dev: &Device, config: MaeConfig, dtype: DType, seed: u64) -> Result<Self> {
        config.check()?;
        let table = Table::new(&config);
        let (grid, shapes) = (config.grid(), table.shapes());
        let rows = PREFIX + config.patches();
        let ((mut weights, rounded, mut pos_embed, mut decoder_pos_embed), _) =
            Arena::build(dev, "weights", |arena| {
                (
                    arena.list(dtype.wide(), &shapes),
                    (dtype != dtype.wide()).then(|| arena.list(dtype, &shapes)),
                    arena.tensor(dtype, &[rows, config.dim]),
                    arena.tensor(dtype, &[rows, config.decoder_dim]),
                )
            })?;
        table.init(dev, &mut weights, seed)?;
        for (tensor, dim) in
            [(&mut pos_embed, config.dim), (&mut decoder_pos_embed, config.decoder_dim)]
        {
            let table = pos_embed::table(grid, dim);
            params::write(dev, tensor.view_mut(), |i| table[i])?;
        }
        let mut mae = Self { config, dtype, table, weights, rounded, pos_embed, decoder_pos_embed };
        mae.round(dev)?;
        Ok(mae)
    }

    /// Rounds the weights anew, after they were written from outside.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`].
    pub fn round(&mut self, dev: &Device) -> Result<()> {
        match &mut self.rounded {
            None => Ok(()),
            Some(rounded) => cast::forward(
                dev,
                cast::Forward { out: rounded.flat_mut(), inp: self.weights.flat() },
            ),
        }
    }

    /// The weights that the network computes with.
    fn computed(&self) -> &TensorList {
        self.rounded.as_ref().unwrap_or(&self.weights)
    }

    /// The network's sizes.
    #[must_use]
    pub fn config(&self) -> &MaeConfig {
        &self.config
    }

    /// The dtype of activations, and of the weights that the network computes with.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The table of trainable tensors.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Tensors like [`weights`](Self::weights), zero: for gradients and moments. Returns their size in bytes too.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn like_weights(&self, dev: &Device, what: &'static str) -> Result<(TensorList, usize)> {
        let shapes = self.table.shapes();
        let (mut list, bytes) =
            Arena::build(dev, what, |arena| arena.list(self.dtype.wide(), &shapes))?;
        dev.clear(list.flat_mut())?;
        Ok((list, bytes))
    }

    /// Workspace for [`forward`](Self::forward) and [`backward`](Self::backward), in bytes.
    #[must_use]
    pub fn workspace_bytes(&self, dev: &Device, batch: Batch) -> usize {
        super::activations::workspace_bytes(dev, self.dtype, &self.config, batch)
    }

    /// From `acts.patches` and the ids to `acts.pred`.
    ///
    /// # Errors
    /// Those of the ops, if activations or workspace were made for another network or batch.
    pub fn forward(
        &self,
        dev: &Device,
        acts: &mut Activations,
        workspace: &mut Tensor,
    ) -> Result<()> {
        let (table, weights) = (&self.table, self.computed());
        let w = |index: usize| weights.view(index);
        let dim = self.config.dim;
        patch_embed::forward(
            dev,
            patch_embed::Forward {
                out: acts.tokens.view_mut(),
                patches: acts.patches.view(),
                ids_keep: acts.ids_keep.view(),
                weight: w(table.patch_embed.weight)
                    .reshaped(&[dim, self.config.patch_numbers()])?,
                bias: w(table.patch_embed.bias),
                cls_token: w(table.cls_token).reshaped(&[dim])?,
                pos_embed: self.pos_embed.view(),
                workspace: workspace.view_mut(),
            },
        )?;
        let mut stream = &acts.tokens;
        for (ids, acts) in table.blocks.iter().zip(&mut acts.blocks) {
            block::forward(dev, weights, ids, stream.view(), acts, workspace)?;
            stream = &acts.out;
        }
        layer_norm::forward(
            dev,
            layer_norm::Forward {
                out: acts.latent.view_mut(),
                mean: acts.latent_mean.view_mut(),
                rstd: acts.latent_rstd.view_mut(),
                inp: stream.view(),
                select: None,
                weight: w(table.norm.weight),
                bias: w(table.norm.bias),
                eps: LAYER_NORM_EPS,
            },
        )?;
        linear::forward(
            dev,
            linear::Forward {
                out: acts.embedded.view_mut(),
                inp: acts.latent.view(),
                weight: w(table.decoder_embed.weight),
                bias: w(table.decoder_embed.bias),
                epilogue: linear::Epilogue::None,
            },
        )?;
        add_positions::forward(
            dev,
            add_positions::Forward {
                out: acts.decoder_rows.view_mut(),
                inp: acts.embedded.view(),
                ids_keep: acts.ids_keep.view(),
                mask_token: w(table.mask_token).reshaped(&[self.config.decoder_dim])?,
                pos_embed: self.decoder_pos_embed.view(),
            },
        )?;
        let (kept, fill) = decoder_rows(acts.decoder_rows.view(), acts.embedded.shape())?;
        restore_tokens::forward(
            dev,
            restore_tokens::Forward {
                out: acts.decoder_tokens.view_mut(),
                inp: kept,
                fill,
                ids_restore: acts.ids_restore.view(),
            },
        )?;
        let mut stream = &acts.decoder_tokens;
        for (ids, acts) in table.decoder_blocks.iter().zip(&mut acts.decoder_blocks) {
            block::forward(dev, weights, ids, stream.view(), acts, workspace)?;
            stream = &acts.out;
        }
        // Only predicted patches go on: the loss sees no others.
        layer_norm::forward(
            dev,
            layer_norm::Forward {
                out: acts.decoded.view_mut(),
                mean: acts.decoded_mean.view_mut(),
                rstd: acts.decoded_rstd.view_mut(),
                inp: stream.view(),
                select: Some(layer_norm::Select { ids: acts.ids_predicted.view(), prefix: PREFIX }),
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

    /// From `scratch.grad_pred` to the gradients of all weights, which accumulate into `grads`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward(
        &self,
        dev: &Device,
        acts: &Activations,
        grads: &mut TensorList,
        scratch: &mut Scratch,
        workspace: &mut Tensor,
    ) -> Result<()> {
        let (table, weights) = (&self.table, self.computed());
        let w = |index: usize| weights.view(index);
        let Scratch { grad_pred, grad_decoded, decoder, grad_decoder_rows, encoder } = scratch;
        // decoder_pred.
        let ids = table.decoder_pred;
        let [grad_weight, grad_bias] = grads.views_mut([ids.weight, ids.bias]);
        linear::backward(
            dev,
            linear::Backward {
                grad_inp: linear::GradInput::Plain(grad_decoded.view_mut()),
                grad_weight,
                grad_bias,
                grad_out: grad_pred.view(),
                inp: acts.decoded.view(),
                weight: w(ids.weight),
                workspace: workspace.view_mut(),
            },
        )?;
        // decoder_norm of the predicted patches: the other tokens' gradient is zero.
        dev.clear(decoder.grad_stream.view_mut())?;
        let ids = table.decoder_norm;
        let [grad_weight, grad_bias] = grads.views_mut([ids.weight, ids.bias]);
        layer_norm::backward(
            dev,
            layer_norm::Backward {
                grad_inp: decoder.grad_stream.view_mut(),
                grad_weight,
                grad_bias,
                grad_out: grad_decoded.view(),
                inp: last(&acts.decoder_blocks, &acts.decoder_tokens).view(),
                select: Some(layer_norm::Select { ids: acts.ids_predicted.view(), prefix: PREFIX }),
                mean: acts.decoded_mean.view(),
                rstd: acts.decoded_rstd.view(),
                weight: w(ids.weight),
                workspace: workspace.view_mut(),
            },
        )?;
        for (l, ids) in table.decoder_blocks.iter().enumerate().rev() {
            let inp = last(&acts.decoder_blocks[..l], &acts.decoder_tokens).view();
            let acts = &acts.decoder_blocks[l];
            block::backward(dev, weights, grads, ids, inp, acts, decoder, workspace)?;
        }
        // restore_tokens.
        let embedded = acts.embedded.shape();
        let (grad_kept, grad_fill) = decoder_rows_mut(grad_decoder_rows.view_mut(), embedded)?;
        restore_tokens::backward(
            dev,
            restore_tokens::Backward {
                grad_inp: grad_kept,
                grad_fill,
                grad_out: decoder.grad_stream.view(),
                ids_restore: acts.ids_restore.view(),
            },
        )?;
        // add_positions: what reaches a kept row is the gradient of the embedded token as it is.
        let (grad_embedded, grad_fill) = decoder_rows(grad_decoder_rows.view(), embedded)?;
        let [grad_mask_token] = grads.views_mut([table.mask_token]);
        add_positions::backward(
            dev,
            add_positions::Backward {
                grad_mask_token: grad_mask_token.reshaped(&[self.config.decoder_dim])?,
                grad_fill,
            },
        )?;
        // decoder_embed.
        let ids = table.decoder_embed;
        let [grad_weight, grad_bias] = grads.views_mut([ids.weight, ids.bias]);
        linear::backward(
            dev,
            linear::Backward {
                grad_inp: linear::GradInput::Plain(encoder.grad_branch.view_mut()),
                grad_weight,
                grad_bias,
                grad_out: grad_embedded,
                inp: acts.latent.view(),
                weight: w(ids.weight),
                workspace: workspace.view_mut(),
            },
        )?;
        // norm.
        dev.clear(encoder.grad_stream.view_mut())?;
        let ids = table.norm;
        let [grad_weight, grad_bias] = grads.views_mut([ids.weight, ids.bias]);
        layer_norm::backward(
            dev,
            layer_norm::Backward {
                grad_inp: encoder.grad_stream.view_mut(),
                grad_weight,
                grad_bias,
                grad_out: encoder.grad_branch.view(),
                inp: last(&acts.blocks, &acts.tokens).view(),
                select: None,
                mean: acts.latent_mean.view(),
                rstd: acts.latent_rstd.view(),
                weight: w(ids.weight),
                workspace: workspace.view_mut(),
            },
        )?;
        for (l, ids) in table.blocks.iter().enumerate().rev() {
            let inp = last(&acts.blocks[..l], &acts.tokens).view();
            let acts = &acts.blocks[l];
            block::backward(dev, weights, grads, ids, inp, acts, encoder, workspace)?;
        }
        // patch_embed.
        let (ids, dim) = (table.patch_embed, self.config.dim);
        let [grad_weight, grad_bias, grad_cls_token] =
            grads.views_mut([ids.weight, ids.bias, table.cls_token]);
        patch_embed::backward(
            dev,
            patch_embed::Backward {
                grad_weight: grad_weight.reshaped(&[dim, self.config.patch_numbers()])?,
                grad_bias,
                grad_cls_token: grad_cls_token.reshaped(&[dim])?,
                grad_out: encoder.grad_stream.view(),
                patches: acts.patches.view(),
                workspace: workspace.view_mut(),
            },
        )
    }
}

/// The residual stream after the last of `blocks`, or before the first.
fn last<'a>(blocks: &'a [super::activations::BlockActivations], tokens: &'a Tensor) -> &'a Tensor {
    blocks.last().map_or(tokens, |block| &block.out)
}

/// Of rows as [`add_positions`] lays them out, those of the kept tokens, shaped `(B, 1 + K, Dd)`, and those of the mask
/// token, `(L, Dd)`.
fn decoder_rows<'a>(rows: TensorRef<'a>, kept: &[usize]) -> Result<(TensorRef<'a>, TensorRef<'a>)> {
    let (elems, dim) = (rows.elems(), rows.shape()[1]);
    let (first, last) = rows.reshaped(&[elems])?.split_at(kept.iter().product());
    let patches = last.elems() / dim;
    Ok((first.reshaped(kept)?, last.reshaped(&[patches, dim])?))
}

/// As [`decoder_rows`].
fn decoder_rows_mut<'a>(
    rows: TensorMut<'a>,
    kept: &[usize],
) -> Result<(TensorMut<'a>, TensorMut<'a>)> {
    let (elems, dim) = (rows.elems(), rows.shape()[1]);
    let (first, last) = rows.reshaped(&[elems])?.split_at(kept.iter().product());
    let patches = last.elems() / dim;
    Ok((first.reshaped(kept)?, last.reshaped(&[patches, dim])?))
}
