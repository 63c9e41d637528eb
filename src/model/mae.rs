//! The masked autoencoder (He et al. 2021, arXiv:2111.06377): forward, then backward, mirrored.

use super::activations::{Activations, Batch, Scratch};
use super::block::{self, Norm};
use super::config::LAYER_NORM_EPS;
use super::params::{self, Table};
use super::{MaeConfig, decoder, pos_embed};
use crate::ops::{cast, layer_norm, linear, patch_embed};
use crate::profile::stage;
use crate::{Arena, DType, Device, Result, Tensor, TensorList, TensorRef};

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

    /// Replaces weight `index`, by a tensor of its dtype and shape on the device or the host, and rounds it.
    ///
    /// # Errors
    /// As [`Device::copy`].
    ///
    /// # Panics
    /// If there is no such weight.
    pub fn set_weight(&mut self, dev: &Device, index: usize, weight: TensorRef<'_>) -> Result<()> {
        let [into] = self.weights.views_mut([index]);
        dev.copy(into, weight)?;
        let Some(rounded) = &mut self.rounded else { return Ok(()) };
        let [out] = rounded.views_mut([index]);
        cast::forward(dev, cast::Forward { out, inp: self.weights.view(index) })
    }

    /// Replaces the fixed positions, `(1 + L, D)` and `(1 + L, Dd)`.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`].
    ///
    /// # Panics
    /// If they have other sizes.
    pub fn set_positions(&mut self, dev: &Device, positions: &[Vec<f32>; 2]) -> Result<()> {
        let tables = [&mut self.pos_embed, &mut self.decoder_pos_embed];
        for (table, positions) in tables.into_iter().zip(positions) {
            assert_eq!(table.view().elems(), positions.len(), "the caller knows the sizes");
            params::write(dev, table.view_mut(), |i| f64::from(positions[i]))?;
        }
        Ok(())
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
        let encoder = stage("encoder", None);
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
        for (l, (ids, acts)) in table.blocks.iter().zip(&mut acts.blocks).enumerate() {
            let _block = stage("block", l);
            block::forward(dev, weights, ids, stream.view(), acts, workspace)?;
            stream = &acts.after.out;
        }
        layer_norm::forward(
            dev,
            layer_norm::Forward {
                out: acts.latent.view_mut(),
                mean: acts.latent_mean.view_mut(),
                rstd: acts.latent_rstd.view_mut(),
                inp: stream.view(),
                weight: w(table.norm.weight),
                bias: w(table.norm.bias),
                eps: LAYER_NORM_EPS,
            },
        )?;
        drop(encoder);
        let _decoder = stage("decoder", None);
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
        let pos_embed = self.decoder_pos_embed.view();
        decoder::forward(dev, weights, table, pos_embed, acts, workspace)
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
        let mut pass = block::Backward { dev, weights, grads, workspace };
        let decoder = stage("decoder", None);
        pass.decoder(table, acts, scratch)?;
        let Scratch { rows, encoder, .. } = scratch;
        let (grad_embedded, _) = rows
            .grad_stream
            .view()
            .split_at(acts.embedded.view().elems() / self.config.decoder_dim);
        pass.linear(
            table.decoder_embed,
            acts.latent.view(),
            grad_embedded,
            linear::GradInput::Plain(encoder.grad_branch.view_mut()),
        )?;
        drop(decoder);
        let _encoder = stage("encoder", None);
        dev.clear(encoder.grad_stream.view_mut())?;
        pass.norm(
            table.norm,
            Norm {
                inp: decoder::stream(&acts.blocks, &acts.tokens).view(),
                mean: acts.latent_mean.view(),
                rstd: acts.latent_rstd.view(),
            },
            encoder.grad_branch.view(),
            encoder.grad_stream.view_mut(),
        )?;
        for (l, ids) in table.blocks.iter().enumerate().rev() {
            let _block = stage("block", l);
            let inp = decoder::stream(&acts.blocks[..l], &acts.tokens).view();
            pass.block(ids, inp, &acts.blocks[l], encoder)?;
        }
        // patch_embed.
        let (ids, dim) = (table.patch_embed, self.config.dim);
        let block::Backward { grads, workspace, .. } = pass;
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
