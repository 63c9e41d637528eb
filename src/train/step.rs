//! One training step: masks, input, target, forward, loss, backward, update.

use super::feed::{Feed, Inputs, Work};
use super::plan::Plan;
use crate::TensorList;
use crate::model::params::Spec;
use crate::model::{Activations, Mae, MaeConfig, Scratch};
use crate::ops::low_freq_target::{self, Filter};
use crate::ops::{adamw, grad_norm, input, masked_mse_loss, random_masking};
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
    /// On a GPU: whether a step's work is recorded once and then run again as a whole. Changes no bit.
    pub record: bool,
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
    /// Accumulated gradients, as the weights.
    pub grads: TensorList,
    acts: Activations,
    scratch: Scratch,
    target: Tensor,
    /// Pixels of the whole crops, and the filter over them, if the target is filtered.
    filtered: Option<(Tensor, Filter)>,
    pixel_dtype: DType,
    exact: bool,
    scalars: Scalars,
    workspace: Tensor,
    /// On a GPU: its copy of the micro-batch, and the step as recorded work.
    feed: Option<Feed>,
    micro_work: Work,
    update_work: Work,
    /// What the recorded work was recorded for.
    micro_batches: usize,
    memory_bytes: usize,
}

/// Numbers that change from step to step, where the ops read them: on a GPU a step recorded once can then be run again.
#[derive(Debug)]
pub(super) struct Scalars {
    /// `(1)`.
    loss: Tensor,
    /// `(1)`.
    norm: Tensor,
    /// `(COEFFICIENTS)`.
    coefficients: Tensor,
    /// `(1)` f64.
    lr: Tensor,
    /// `(1)` i64: updates done.
    updates: Tensor,
    /// `(1)` i64.
    epoch: Tensor,
}

impl Scalars {
    pub(super) fn new(arena: &mut Arena, wide: DType) -> Self {
        Self {
            loss: arena.tensor(wide, &[1]),
            norm: arena.tensor(wide, &[1]),
            coefficients: arena.tensor(wide, &[adamw::COEFFICIENTS]),
            lr: arena.tensor(DType::F64, &[1]),
            updates: arena.tensor(DType::I64, &[1]),
            epoch: arena.tensor(DType::I64, &[1]),
        }
    }
}

impl Trainer {
    /// Plans and allocates everything a run needs.
    ///
    /// # Errors
    /// As [`MaeConfig::check`] and [`Filter::new`]; [`crate::Error::Invalid`] for a micro-batch that does not fit into a
    /// GPU's memory, naming one that does; [`crate::Error::OutOfMemory`].
    pub fn new(dev: Device, config: MaeConfig, dtype: DType, settings: Settings) -> Result<Self> {
        config.check()?;
        let filter =
            settings.radius.map(|r| Filter::new(&dev, config.image_size, r)).transpose()?;
        let plan = Plan {
            dev: &dev,
            config: &config,
            dtype,
            settings: &settings,
            filter: filter.as_ref(),
        };
        plan.expect_room()?;
        let (images, memory_bytes) = (settings.micro_batch, plan.bytes(settings.micro_batch));
        let ((acts, target, pixels), _) =
            Arena::build(&dev, "activations", |arena| plan.activations(arena, images))?;
        let ((scratch, scalars, workspace), _) =
            Arena::build(&dev, "workspace", |arena| plan.workspace(arena, images))?;
        let (pixel_dtype, exact) = (plan.pixel_dtype(), plan.filters_exactly());
        let mae = Mae::new(&dev, config, dtype, settings.seed)?;
        let (exp_avg, _) = mae.like_weights(&dev, "first moments")?;
        let (exp_avg_sq, _) = mae.like_weights(&dev, "second moments")?;
        let (grads, _) = mae.like_weights(&dev, "gradients")?;
        let mut trainer = Self {
            dev,
            settings,
            mae,
            exp_avg,
            exp_avg_sq,
            grads,
            acts,
            scratch,
            target,
            filtered: pixels.zip(filter),
            pixel_dtype,
            exact,
            scalars,
            workspace,
            feed: None,
            micro_work: Work::New,
            update_work: Work::New,
            micro_batches: 0,
            memory_bytes,
        };
        trainer.set_updates(0)?;
        trainer.clear()?;
        Ok(trainer)
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

    /// What [`input`] writes for the filter: a GPU filters bytes, exactly.
    #[must_use]
    pub fn pixel_dtype(&self) -> DType {
        self.pixel_dtype
    }

    /// Adds the gradient of one of the `micro_batches` of a step. On a GPU it is enqueued, and the batch's memory may be
    /// reused at once.
    ///
    /// # Errors
    /// Those of the ops, if the batch does not fit the settings.
    pub fn accumulate(&mut self, batch: MicroBatch<'_>, micro_batches: usize) -> Result<()> {
        self.dev.upload(self.scalars.epoch.view_mut(), &[i64::from(batch.epoch)])?;
        let Device::Cuda(gpu) = self.dev.clone() else {
            return self.micro_step(Inputs::on_host(batch)?, micro_batches);
        };
        let mut feed = match self.feed.take() {
            Some(feed) if feed.holds(batch) && self.micro_batches == micro_batches => feed,
            _ => {
                self.micro_work = Work::New;
                self.micro_batches = micro_batches;
                // Photos differ in size: some room, so that a larger batch need not be recorded anew.
                Feed::new(&self.dev, self.settings.micro_batch, batch.images.len() / 4 * 5)?
            }
        };
        feed.fill(&self.dev, batch, self.mae.config().image_size)?;
        let mut work = std::mem::take(&mut self.micro_work);
        let record = self.settings.record;
        let done = work.run(&gpu, record, || self.micro_step(feed.inputs(), micro_batches));
        (self.feed, self.micro_work) = (Some(feed), work);
        done
    }

    /// Enqueues one micro-batch.
    fn micro_step(&mut self, inputs: Inputs<'_>, micro_batches: usize) -> Result<()> {
        let Self { dev, settings, acts, scratch, scalars, workspace, .. } = self;
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
                    epoch: scalars.epoch.view(),
                    samples: inputs.samples,
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
                images: inputs.images,
                geometry: inputs.geometry,
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
                    exact: self.exact,
                    workspace: workspace.view_mut(),
                },
            )?;
        }
        self.mae.forward(dev, acts, workspace)?;
        masked_mse_loss::forward_backward(
            dev,
            masked_mse_loss::ForwardBackward {
                loss: scalars.loss.view_mut(),
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
        self.dev.upload(self.scalars.lr.view_mut(), &[lr])?;
        match self.dev.clone() {
            Device::Cuda(gpu) => {
                let mut work = std::mem::take(&mut self.update_work);
                let done = work.run(&gpu, self.settings.record, || self.enqueue_update());
                self.update_work = work;
                done?;
            }
            Device::Cpu(_) => self.enqueue_update()?,
        }
        let (dev, scalars) = (&self.dev, &self.scalars);
        Ok(Outcome {
            loss: dev.scalar(scalars.loss.view())?,
            grad_norm: dev.scalar(scalars.norm.view())?,
            updated: dev.scalar(scalars.coefficients.view().split_at(1).0)? != 0.0,
        })
    }

    fn enqueue_update(&mut self) -> Result<()> {
        let Self { dev, settings, grads, scalars, .. } = self;
        grad_norm::forward(
            dev,
            grad_norm::Forward {
                norm: scalars.norm.view_mut(),
                grad: grads.flat(),
                workspace: self.workspace.view_mut(),
            },
        )?;
        adamw::prepare(
            dev,
            adamw::Prepare {
                coefficients: scalars.coefficients.view_mut(),
                step: scalars.updates.view_mut(),
                lr: scalars.lr.view(),
                loss: scalars.loss.view(),
                grad_norm: scalars.norm.view(),
                clip: settings.clip,
                betas: settings.betas,
            },
        )?;
        // Decaying tensors lie before the others.
        let decaying = self.mae.table().decaying(settings.decay_tokens);
        let split = self.mae.weights.offset(decaying);
        let mut parts = [&mut self.mae.weights, &mut self.exp_avg, &mut self.exp_avg_sq]
            .map(|list| <[_; 2]>::from(list.flat_mut().split_at(split)))
            .map(|part| part.into_iter());
        let copies = match &mut self.mae.rounded {
            Some(list) => <[_; 2]>::from(list.flat_mut().split_at(split)).map(Some),
            None => [None, None],
        };
        let grads = <[_; 2]>::from(grads.flat().split_at(split));
        for ((copy, grad), weight_decay) in
            copies.into_iter().zip(grads).zip([settings.weight_decay, 0.0])
        {
            let [param, exp_avg, exp_avg_sq] =
                parts.each_mut().map(|part| part.next().expect("two groups"));
            adamw::update(
                dev,
                adamw::Update {
                    param,
                    copy,
                    exp_avg,
                    exp_avg_sq,
                    grad,
                    coefficients: scalars.coefficients.view(),
                    betas: settings.betas,
                    eps: settings.eps,
                    weight_decay,
                },
            )?;
        }
        Ok(())
    }

    /// Updates done: what Adam's bias correction counts.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`].
    pub fn updates(&self) -> Result<u64> {
        Ok(self.dev.download::<i64>(self.scalars.updates.view())?[0].cast_unsigned())
    }

    /// Goes on from a run that has done this many.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`].
    pub fn set_updates(&mut self, updates: u64) -> Result<()> {
        self.dev.upload(self.scalars.updates.view_mut(), &[updates.cast_signed()])
    }

    /// Forgets accumulated gradients and loss: before a step, and when one is given up half-way.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`].
    pub fn clear(&mut self) -> Result<()> {
        self.dev.clear(self.grads.flat_mut())?;
        self.dev.clear(self.scalars.loss.view_mut())
    }

    /// Norm of each tensor's accumulated gradient, with its name: to find where a non-finite one came from.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`].
    pub fn grad_norms(&self) -> Result<Vec<(String, f64)>> {
        let squares = |tensor: TensorRef<'_>| -> Result<f64> {
            Ok(match tensor.dtype() {
                DType::F64 => self.dev.read::<f64>(tensor)?.iter().map(|g| g * g).sum(),
                _ => self.dev.read::<f32>(tensor)?.iter().map(|&g| f64::from(g).powi(2)).sum(),
            })
        };
        let specs = self.mae.table().specs().iter().enumerate();
        let norm = |(i, spec): (usize, &Spec)| {
            Ok((spec.name.clone(), squares(self.grads.view(i))?.sqrt()))
        };
        specs.map(norm).collect()
    }
}
