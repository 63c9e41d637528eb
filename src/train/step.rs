//! One training step: masks, input, target, forward, loss, backward, update.

mod batch;

pub use self::batch::{Inputs, MicroBatch};
use super::feed::{Feed, Work};
use super::plan::Plan;
use super::resample::Resampled;
use crate::TensorList;
use crate::data::loader::Batch;
use crate::model::params::Spec;
use crate::model::{Activations, Mae, MaeConfig, Scratch};
use crate::ops::low_freq_target::{self, Filter};
use crate::ops::resize::Interpolation;
use crate::ops::{adamw, grad_norm, input, masked_mse_loss, random_masking};
use crate::profile::stage;
use crate::{Arena, DType, Device, Error, HostBuffer, Result, Tensor, TensorRef};

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
    /// How the step resamples images to crops before it reads them: each is then a rectangle as
    /// [`resize`](crate::ops::resize) takes it. None: crops are cut from the images as they are.
    pub resize: Option<Interpolation>,
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

impl Settings {
    /// Refuses sizes that leave the network or the loss nothing to work on; the ops judge the numbers.
    fn check(&self, patches: usize) -> Result<()> {
        if self.micro_batch == 0 {
            return Err(Error::invalid("micro_batch", "is 0; a step has at least one image"));
        }
        if !(1..patches).contains(&self.kept) {
            let why = format!("is {} of {patches} patches; keep and mask at least one", self.kept);
            return Err(Error::invalid("kept", why));
        }
        Ok(())
    }
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
    /// The device it was made with: memory is had and given back on its stream, as later ones may be gone by then.
    home: Device,
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
    resampled: Option<Resampled>,
    /// Pixels of the whole crops, and the filter over them, if the target is filtered.
    filtered: Option<(Tensor, Filter)>,
    pixel_dtype: DType,
    exact: bool,
    scalars: Scalars,
    workspace: Tensor,
    /// On a GPU: its copy of the micro-batch, and the step as recorded work.
    feed: Option<Feed>,
    accumulate_work: Work,
    forward_work: Work,
    backward_work: Work,
    update_work: Work,
    /// What forward passes were recorded for.
    micro_batches: usize,
    /// Whether there are activations that no backward pass has used.
    forwarded: bool,
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
}

impl Scalars {
    pub(super) fn new(arena: &mut Arena, wide: DType) -> Self {
        Self {
            loss: arena.tensor(wide, &[1]),
            norm: arena.tensor(wide, &[1]),
            coefficients: arena.tensor(wide, &[adamw::COEFFICIENTS]),
            lr: arena.tensor(DType::F64, &[1]),
            updates: arena.tensor(DType::I64, &[1]),
        }
    }
}

impl Trainer {
    /// Plans and allocates everything a run needs.
    ///
    /// # Errors
    /// As [`MaeConfig::check`] and [`Filter::new`]; [`Error::Invalid`] for a micro-batch that does not fit into a
    /// GPU's memory, naming one that does; [`Error::OutOfMemory`].
    pub fn new(dev: Device, config: MaeConfig, dtype: DType, settings: Settings) -> Result<Self> {
        config.check()?;
        settings.check(config.patches())?;
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
        let ((acts, target, pixels, resampled), _) =
            Arena::build(&dev, "activations", |arena| plan.activations(arena, images))?;
        let ((scratch, scalars, workspace), _) =
            Arena::build(&dev, "workspace", |arena| plan.workspace(arena, images))?;
        let (pixel_dtype, exact) = (plan.pixel_dtype(), plan.filters_exactly());
        let mae = Mae::new(&dev, config, dtype, settings.seed)?;
        let (exp_avg, _) = mae.like_weights(&dev, "first moments")?;
        let (exp_avg_sq, _) = mae.like_weights(&dev, "second moments")?;
        let (grads, _) = mae.like_weights(&dev, "gradients")?;
        let mut trainer = Self {
            home: dev.clone(),
            dev,
            settings,
            mae,
            exp_avg,
            exp_avg_sq,
            grads,
            acts,
            scratch,
            target,
            resampled,
            filtered: pixels.zip(filter),
            pixel_dtype,
            exact,
            scalars,
            workspace,
            feed: None,
            accumulate_work: Work::New,
            forward_work: Work::New,
            backward_work: Work::New,
            update_work: Work::New,
            micro_batches: 0,
            forwarded: false,
            memory_bytes,
        };
        trainer.set_updates(0)?;
        trainer.clear()?;
        if let Some(resampled) = &mut trainer.resampled {
            resampled.place(&trainer.dev)?;
        }
        // What there is to tell before the first update.
        let Scalars { norm, coefficients, .. } = &mut trainer.scalars;
        trainer.dev.clear(norm.view_mut())?;
        trainer.dev.clear(coefficients.view_mut())?;
        Ok(trainer)
    }

    /// Bytes of all arenas.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// What it was made to compute.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The device it runs on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.dev
    }

    /// Whether, on a GPU, a step's work is recorded once and then run again as a whole.
    pub(super) fn records(&self) -> bool {
        self.settings.record
    }

    /// What the last forward pass left: masks and prediction among it.
    #[must_use]
    pub fn activations(&self) -> &Activations {
        &self.acts
    }

    /// `(B, M, E)`, wide: what the last forward pass was to predict.
    #[must_use]
    pub fn target(&self) -> &Tensor {
        &self.target
    }

    /// What [`input`] writes for the filter: a GPU filters bytes, exactly.
    #[must_use]
    pub fn pixel_dtype(&self) -> DType {
        self.pixel_dtype
    }

    /// Goes on with another device of the same memory: a GPU on another stream, a CPU that multiplies otherwise. What was
    /// recorded is recorded anew. Work on the new stream must be ordered after that on the old one, by an event say; the
    /// stream that the trainer was made with must outlive it.
    ///
    /// # Errors
    /// [`Error::Place`] for a device with other memory.
    pub fn set_device(&mut self, dev: Device) -> Result<()> {
        let (expected, found) = (self.dev.place(), dev.place());
        if found != expected {
            return Err(Error::Place { op: "set_device", arg: "dev", expected, found });
        }
        self.dev = dev;
        self.accumulate_work = Work::New;
        self.forward_work = Work::New;
        self.backward_work = Work::New;
        self.update_work = Work::New;
        Ok(())
    }

    /// Waits for all work enqueued so far.
    ///
    /// # Errors
    /// [`Error::Gpu`] for what went wrong in that work.
    pub fn synchronize(&self) -> Result<()> {
        if let Device::Cuda(gpu) = &self.dev { gpu.synchronize() } else { Ok(()) }
    }

    /// Adds the gradient of one of the `micro_batches` of a step, as [`forward_loss`](Self::forward_loss) and
    /// [`backward`](Self::backward) do. On a GPU it is enqueued, and the batch's memory may be reused at once.
    ///
    /// A GPU goes from one micro-batch to the next without the host: this copies the images, judges the geometry, enqueues
    /// copies to the GPU, which travel beside the work before them, and one recording, of forward and backward; it waits for
    /// nothing but room for the copies, which a micro-batch or two before have left. From the last micro-batch of a step
    /// to the next step it waits in [`outcome`](Self::outcome).
    ///
    /// # Errors
    /// Those of the ops, if the batch does not fit the settings.
    pub fn accumulate(&mut self, batch: MicroBatch<'_>, micro_batches: usize) -> Result<()> {
        let epoch = [i64::from(batch.epoch)];
        self.accumulate_inputs(Inputs::on_host(batch, &epoch)?, None, micro_batches)
    }

    /// As [`accumulate`](Self::accumulate), of a batch of the loader's. If that is
    /// [made for](crate::data::loader::Loader::for_device) this device, the images are not copied on the host: the GPU reads
    /// them where they are, and the loader fills that memory anew when it has.
    ///
    /// # Errors
    /// As [`accumulate`](Self::accumulate).
    pub fn accumulate_batch(&mut self, batch: &Batch, micro_batches: usize) -> Result<()> {
        let epoch = [i64::from(batch.epoch)];
        let inputs = Inputs::on_host(batch.into(), &epoch)?;
        self.accumulate_inputs(inputs, Some(&batch.images), micro_batches)
    }

    fn accumulate_inputs(
        &mut self,
        batch: Inputs<'_>,
        images: Option<&HostBuffer>,
        micro_batches: usize,
    ) -> Result<()> {
        let forward = stage("forward", None);
        self.run_batch(
            batch,
            images,
            micro_batches,
            |step| &mut step.accumulate_work,
            |step, inputs| {
                step.enqueue_forward(inputs, micro_batches)?;
                drop(forward);
                step.enqueue_backward()
            },
        )
    }

    /// Adds to the loss that of one of the `micro_batches` of a step. On a GPU it is enqueued; a batch that is there
    /// already is copied within it.
    ///
    /// # Errors
    /// As [`accumulate`](Self::accumulate).
    pub fn forward_loss(&mut self, batch: Inputs<'_>, micro_batches: usize) -> Result<()> {
        let _forward = stage("forward", None);
        self.run_batch(
            batch,
            None,
            micro_batches,
            |step| &mut step.forward_work,
            |step, inputs| step.enqueue_forward(inputs, micro_batches),
        )?;
        self.forwarded = true;
        Ok(())
    }

    /// From the batch to the loss.
    fn enqueue_forward(&mut self, inputs: Inputs<'_>, micro_batches: usize) -> Result<()> {
        let Self { dev, settings, acts, scratch, scalars, workspace, .. } = self;
        let patch_size = self.mae.config().patch_size;
        let input_stage = stage("input", None);
        // Which patches the encoder sees.
        random_masking::forward(
            dev,
            random_masking::Forward {
                ids_keep: acts.ids_keep.view_mut(),
                ids_masked: acts.ids_predicted.view_mut(),
                ids_restore: acts.ids_restore.view_mut(),
                noise: random_masking::Noise::Drawn {
                    seed: settings.seed,
                    epoch: inputs.epoch,
                    samples: inputs.samples,
                },
                block: settings.mask_block,
                workspace: workspace.view_mut(),
            },
        )?;
        // Rectangles to crops.
        let (images, geometry) = match &mut self.resampled {
            Some(resampled) => resampled.forward(dev, inputs.images, inputs.geometry)?,
            None => (inputs.images, inputs.geometry),
        };
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
                images,
                geometry,
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
        drop(input_stage);
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
        )
    }

    /// Adds the gradient of the loss that [`forward_loss`](Self::forward_loss) has just computed. On a GPU it is enqueued.
    ///
    /// # Errors
    /// [`Error::Invalid`] without a `forward_loss` of its own before it; those of the ops.
    pub fn backward(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.forwarded) {
            let why = "finds no activations; each is for one forward_loss, which comes before it";
            return Err(Error::invalid("backward", why));
        }
        self.run(|step| &mut step.backward_work, Self::enqueue_backward)
    }

    fn enqueue_backward(&mut self) -> Result<()> {
        let _backward = stage("backward", None);
        let Self { dev, mae, acts, grads, scratch, workspace, .. } = self;
        mae.backward(dev, acts, grads, scratch, workspace)
    }

    /// Takes the step: updates the weights by the accumulated gradient, unless the loss, the gradient or its square is not
    /// finite. Waits for it.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn update(&mut self, lr: f64) -> Result<Outcome> {
        self.enqueue_update(TensorRef::new(&[lr], &[1])?)?;
        self.outcome()
    }

    /// As [`update`](Self::update), without waiting. `lr` is `(1)` f64, in the host's memory or the device's.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn enqueue_update(&mut self, lr: TensorRef<'_>) -> Result<()> {
        let _update = stage("update", None);
        self.dev.copy(self.scalars.lr.view_mut(), lr)?;
        self.run(|step| &mut step.update_work, Self::enqueue_adamw)
    }

    /// What the last update came to, once it is done.
    ///
    /// # Errors
    /// [`Error::Gpu`], also for what went wrong in work enqueued before.
    pub fn outcome(&self) -> Result<Outcome> {
        let (dev, scalars) = (&self.dev, &self.scalars);
        Ok(Outcome {
            loss: dev.scalar(scalars.loss.view())?,
            grad_norm: dev.scalar(scalars.norm.view())?,
            updated: dev.scalar(scalars.coefficients.view().split_at(1).0)? != 0.0,
        })
    }

    fn enqueue_adamw(&mut self) -> Result<()> {
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
    /// [`Error::Gpu`].
    pub fn updates(&self) -> Result<u64> {
        Ok(self.dev.download::<i64>(self.scalars.updates.view())?[0].cast_unsigned())
    }

    /// Goes on from a run that has done this many.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn set_updates(&mut self, updates: u64) -> Result<()> {
        self.dev.upload(self.scalars.updates.view_mut(), &[updates.cast_signed()])
    }

    /// Forgets accumulated gradients and loss: before a step, and when one is given up half-way.
    ///
    /// # Errors
    /// [`Error::Gpu`].
    pub fn clear(&mut self) -> Result<()> {
        self.forwarded = false;
        self.dev.clear(self.grads.flat_mut())?;
        self.dev.clear(self.scalars.loss.view_mut())
    }

    /// Norm of each tensor's accumulated gradient, with its name: to find where a non-finite one came from.
    ///
    /// # Errors
    /// [`Error::Gpu`].
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
