//! One training step: masks, input, target, forward, loss, backward, update.

use crate::model::activations::Batch;
use crate::model::{Activations, Mae, MaeConfig, Scratch};
use crate::ops::low_freq_target::{self, Filter};
use crate::ops::{adamw, grad_norm, input, masked_mse_loss, random_masking};
use crate::tensor::TensorList;
use crate::{Arena, DType, Device, Result, Tensor, TensorRef};

/// What a step computes, beside the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Images of a micro-batch.
    pub micro_batch: usize,
    /// Radius of the low-pass filter of the target; none: the image itself.
    pub radius: Option<f64>,
    /// Whether each target patch is normalised by its own mean and variance.
    pub norm_pix: bool,
    /// Patches of an image that the encoder sees (K).
    pub kept: usize,
    /// Side of the blocks of patches that are masked together.
    pub mask_block: usize,
    /// Mean of the colours, RGB on [0, 1].
    pub mean: [f64; 3],
    /// Standard deviation of the colours.
    pub std: [f64; 3],
    /// Decay rates of Adam's moments.
    pub betas: [f64; 2],
    /// Adam's epsilon.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether class and mask token decay too.
    pub decay_tokens: bool,
    /// Largest gradient norm; 0: no clipping.
    pub clip: f64,
    /// Seed of weights and masks.
    pub seed: u64,
}

/// The images of one micro-batch, as [`input`] reads them.
#[derive(Clone, Copy, Debug)]
pub struct MicroBatch<'a> {
    /// Bytes of all images.
    pub images: &'a [u8],
    /// Six numbers for each image.
    pub geometry: &'a [i64],
    /// Id of each image: decides its mask, with seed and epoch.
    pub samples: &'a [i64],
    /// Epoch of the step.
    pub epoch: u32,
}

/// What an update came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Mean loss of the step's images.
    pub loss: f64,
    /// L2 norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Whether the weights changed: only if the loss, the norm and its square are finite.
    pub updated: bool,
}

/// Network, gradients, moments, activations: all memory of a run, and the step over it.
#[derive(Debug)]
pub struct Trainer {
    dev: Device,
    settings: Settings,
    /// The network.
    pub mae: Mae,
    /// First moments, as the weights.
    pub exp_avg: TensorList,
    /// Second moments, as the weights.
    pub exp_avg_sq: TensorList,
    /// Updates done: what Adam's bias correction counts.
    pub updates: u64,
    grads: TensorList,
    acts: Activations,
    scratch: Scratch,
    target: Tensor,
    /// Pixels of the whole crops, and the filter over them, if the target is filtered.
    filtered: Option<(Tensor, Filter)>,
    loss: Tensor,
    norm: Tensor,
    workspace: Tensor,
    memory_bytes: usize,
}

impl Trainer {
    /// Plans and allocates everything a run needs.
    ///
    /// # Errors
    /// As [`MaeConfig::check`] and [`Filter::new`]; [`crate::Error::OutOfMemory`].
    pub fn new(dev: Device, config: MaeConfig, dtype: DType, settings: Settings) -> Result<Self> {
        let mae = Mae::new(config, dtype, settings.seed)?;
        let images = settings.micro_batch;
        let masked = config.patches() - settings.kept;
        let batch = Batch { images, kept: settings.kept, predicted: masked };
        let filter = settings.radius.map(|r| Filter::new(config.image_size, r)).transpose()?;
        let (exp_avg, moment_bytes) = mae.like_weights("first moments")?;
        let (exp_avg_sq, _) = mae.like_weights("second moments")?;
        let (grads, _) = mae.like_weights("gradients")?;
        let ((acts, target, pixels), act_bytes) = Arena::build("activations", |arena| {
            let side = config.image_size;
            let acts = Activations::new(arena, dtype, &config, batch);
            let target = arena.tensor(dtype, &[images, masked, config.patch_numbers()]);
            let pixels = filter.as_ref().map(|_| arena.tensor(dtype, &[images, 3, side, side]));
            (acts, target, pixels)
        })?;
        let mut needed = mae.workspace_bytes(batch).max(grad_norm::workspace_bytes(grads.elems()));
        if let Some(filter) = &filter {
            needed = needed.max(low_freq_target::workspace_bytes(dtype, images, filter));
        }
        let ((scratch, loss, norm, workspace), scratch_bytes) =
            Arena::build("workspace", |arena| {
                (
                    Scratch::new(arena, dtype, &config, batch),
                    arena.tensor(dtype, &[1]),
                    arena.tensor(dtype, &[1]),
                    arena.tensor(DType::U8, &[needed]),
                )
            })?;
        Ok(Self {
            dev,
            settings,
            mae,
            exp_avg,
            exp_avg_sq,
            updates: 0,
            grads,
            acts,
            scratch,
            target,
            filtered: pixels.zip(filter),
            loss,
            norm,
            workspace,
            // Weights, gradients and both moments are of one size.
            memory_bytes: 4 * moment_bytes + act_bytes + scratch_bytes,
        })
    }

    /// Bytes of all arenas.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// The device it runs on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.dev
    }

    /// Adds the gradient of one of the `micro_batches` of a step.
    ///
    /// # Errors
    /// Those of the ops, if the batch does not fit the settings.
    pub fn accumulate(&mut self, batch: MicroBatch<'_>, micro_batches: usize) -> Result<()> {
        let Self { dev, settings, acts, scratch, workspace, .. } = self;
        let images = settings.micro_batch;
        let patch_size = self.mae.config().patch_size;
        // Which patches the encoder sees.
        random_masking::forward(
            dev,
            random_masking::Forward {
                ids_keep: acts.ids_keep.view_mut(),
                ids_masked: acts.ids_predicted.view_mut(),
                ids_restore: acts.ids_restore.view_mut(),
                noise: random_masking::Noise::Drawn {
                    seed: settings.seed,
                    epoch: batch.epoch,
                    samples: TensorRef::new(batch.samples, &[images])?,
                },
                block: settings.mask_block,
                workspace: workspace.view_mut(),
            },
        )?;
        // Bytes to patches, and to what the loss will compare with.
        input::forward(
            dev,
            input::Forward {
                patches: acts.patches.view_mut(),
                target: match &mut self.filtered {
                    Some((pixels, _)) => input::Target::Filtered { pixels: pixels.view_mut() },
                    None => input::Target::Raw {
                        target: self.target.view_mut(),
                        ids_masked: acts.ids_predicted.view(),
                    },
                },
                images: TensorRef::new(batch.images, &[batch.images.len()])?,
                geometry: TensorRef::new(batch.geometry, &[images, input::GEOMETRY_FIELDS])?,
                ids_keep: acts.ids_keep.view(),
                mean: settings.mean,
                std: settings.std,
                patch_size,
            },
        )?;
        // PixMIM: the target is the low-pass filtered image.
        if let Some((pixels, filter)) = &self.filtered {
            low_freq_target::forward(
                dev,
                low_freq_target::Forward {
                    target: self.target.view_mut(),
                    pixels: pixels.view(),
                    ids_masked: acts.ids_predicted.view(),
                    filter,
                    mean: settings.mean,
                    std: settings.std,
                    patch_size,
                    workspace: workspace.view_mut(),
                },
            )?;
        }
        self.mae.forward(dev, acts, workspace)?;
        masked_mse_loss::forward_backward(
            dev,
            masked_mse_loss::ForwardBackward {
                loss: self.loss.view_mut(),
                grad_pred: scratch.grad_pred.view_mut(),
                pred: acts.pred.view(),
                target: self.target.view(),
                norm_pix: settings.norm_pix,
                scale: 1.0 / micro_batches as f64,
                workspace: workspace.view_mut(),
            },
        )?;
        self.mae.backward(dev, acts, &mut self.grads, scratch, workspace)
    }

    /// Takes the step: updates the weights by the accumulated gradient, unless the loss, the gradient or its square is not
    /// finite.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn update(&mut self, lr: f64) -> Result<Outcome> {
        let Self { dev, settings, grads, norm, .. } = self;
        grad_norm::forward(
            dev,
            grad_norm::Forward {
                norm: norm.view_mut(),
                grad: grads.flat(),
                workspace: self.workspace.view_mut(),
            },
        )?;
        let (loss, grad_norm) = (self.loss.view().scalar(), norm.view().scalar());
        // A loss overflows before its gradient does; and a gradient whose square does would stay in the second moment.
        let largest = match self.mae.dtype() {
            DType::F64 => f64::MAX,
            _ => f64::from(f32::MAX),
        };
        let is_usable = loss.is_finite() && grad_norm * grad_norm <= largest;
        if !is_usable {
            return Ok(Outcome { loss, grad_norm, updated: false });
        }
        // Decaying tensors lie before the others.
        let decaying = self.mae.table().decaying(settings.decay_tokens);
        let split = self.mae.weights.offset(decaying);
        let [param, exp_avg, exp_avg_sq] =
            [&mut self.mae.weights, &mut self.exp_avg, &mut self.exp_avg_sq]
                .map(|list| list.flat_mut().split_at(split));
        let grad = grads.flat().split_at(split);
        let groups = [
            (param.0, exp_avg.0, exp_avg_sq.0, grad.0, settings.weight_decay),
            (param.1, exp_avg.1, exp_avg_sq.1, grad.1, 0.0),
        ];
        for (param, exp_avg, exp_avg_sq, grad, weight_decay) in groups {
            adamw::update(
                dev,
                adamw::Update {
                    param,
                    exp_avg,
                    exp_avg_sq,
                    grad,
                    grad_norm: norm.view(),
                    clip: settings.clip,
                    lr,
                    betas: settings.betas,
                    eps: settings.eps,
                    weight_decay,
                    step: self.updates + 1,
                },
            )?;
        }
        self.updates += 1;
        Ok(Outcome { loss, grad_norm, updated: true })
    }

    /// Forgets accumulated gradients and loss: before a step, and when one is given up half-way.
    pub fn clear(&mut self) {
        self.grads.flat_mut().clear();
        self.loss.view_mut().clear();
    }

    /// Norm of each tensor's accumulated gradient, with its name: to find where a non-finite one came from.
    #[must_use]
    pub fn grad_norms(&self) -> Vec<(String, f64)> {
        let squares = |tensor: TensorRef<'_>| match tensor.dtype() {
            DType::F64 => tensor.as_slice::<f64>().iter().map(|g| g * g).sum::<f64>(),
            _ => tensor.as_slice::<f32>().iter().map(|&g| f64::from(g) * f64::from(g)).sum(),
        };
        let specs = self.mae.table().specs().iter().enumerate();
        specs.map(|(i, spec)| (spec.name.clone(), squares(self.grads.view(i)).sqrt())).collect()
    }
}
