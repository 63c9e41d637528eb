//! What a run takes of memory, known before any of it is taken.

use super::resample::Resampled;
use super::step::{Scalars, Settings};
use crate::data::loader::MOST_SQUARES;
use crate::model::activations::{self, Batch};
use crate::model::params::Table;
use crate::model::{Activations, MaeConfig, Scratch};
use crate::ops::grad_norm;
use crate::ops::low_freq_target::{self, Filter};
use crate::{Arena, DType, Device, Error, Result, Tensor};

/// Device, network and step of a run: all that decides about its memory, but for the micro-batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan<'a> {
    pub(super) dev: &'a Device,
    pub(super) config: &'a MaeConfig,
    pub(super) dtype: DType,
    pub(super) settings: &'a Settings,
    pub(super) filter: Option<&'a Filter>,
}

/// Share of a GPU's free memory that a run leaves: for planned products and recorded work.
const SPARE_SHARE: u64 = 32;
/// Up to here sums and products of sizes do not overflow.
const MOST_BYTES: f64 = (1u64 << 60) as f64;

impl Plan<'_> {
    fn batch(&self, images: usize) -> Batch {
        let kept = self.settings.kept;
        Batch { images, kept, predicted: self.config.patches() - kept }
    }

    /// What [`crate::ops::input`] writes for the filter: a GPU filters bytes, exactly.
    pub(super) fn pixel_dtype(&self) -> DType {
        match self.dev {
            Device::Cpu(_) => self.dtype,
            Device::Cuda(_) => DType::U8,
        }
    }

    /// Activations, target, the pixels that are filtered, and the crops that images are resampled to.
    pub(super) fn activations(
        &self,
        arena: &mut Arena,
        images: usize,
    ) -> (Activations, Tensor, Option<Tensor>, Option<Resampled>) {
        let Self { config, dtype, settings, .. } = *self;
        let (batch, side) = (self.batch(images), config.image_size);
        let acts = Activations::new(arena, dtype, config, batch);
        let patches = [images, batch.predicted, config.patch_numbers()];
        let target = arena.tensor(dtype.wide(), &patches);
        let pixels =
            self.filter.map(|_| arena.tensor(self.pixel_dtype(), &[images, 3, side, side]));
        let resampled = settings
            .resize
            .map(|interpolation| Resampled::new(arena, [images, side], interpolation));
        (acts, target, pixels, resampled)
    }

    /// Gradients between ops, counters, and the ops' workspace.
    pub(super) fn workspace(&self, arena: &mut Arena, images: usize) -> (Scratch, Scalars, Tensor) {
        let Self { dev, config, dtype, filter, .. } = *self;
        let batch = self.batch(images);
        let of_filter = filter.map(|filter| {
            let (pixels, exact) = (self.pixel_dtype(), self.filters_exactly());
            low_freq_target::workspace_bytes(dev, pixels, images, filter, exact)
        });
        let needed = [
            activations::workspace_bytes(dev, dtype, config, batch),
            grad_norm::workspace_bytes(
                dev,
                self.parameters(dtype.wide()) / dtype.wide().size_bytes(),
            ),
            of_filter.unwrap_or(0),
        ];
        (
            Scratch::new(arena, dtype, config, batch),
            Scalars::new(arena, dtype.wide()),
            arena.tensor(DType::U8, &[needed.into_iter().max().unwrap_or(0)]),
        )
    }

    /// Whether a GPU filters in f32: where activations are f32 too.
    pub(super) fn filters_exactly(&self) -> bool {
        self.dtype != DType::Bf16
    }

    /// Bytes of a list like the weights.
    fn parameters(&self, dtype: DType) -> usize {
        let shapes = Table::new(self.config).shapes();
        Arena::count(|arena| arena.list(dtype, &shapes))
    }

    /// Bytes of all arenas with this micro-batch.
    pub(super) fn bytes(&self, images: usize) -> usize {
        // Weights, gradients and both moments; the rounded weights.
        let wide = 4 * self.parameters(self.dtype.wide());
        let rounded = if self.dtype == self.dtype.wide() { 0 } else { self.parameters(self.dtype) };
        wide + rounded
            + Arena::count(|arena| self.activations(arena, images))
            + Arena::count(|arena| self.workspace(arena, images))
    }

    /// Bytes of the loader's batches on a GPU: the one in work, and two on their way.
    fn batch_bytes(&self, images: usize) -> usize {
        let squares = if self.settings.resize.is_some() { MOST_SQUARES } else { 1 };
        3 * images * squares * 3 * self.config.image_size.pow(2)
    }

    /// Refuses a micro-batch that does not fit into a GPU's free memory, and names one that does; and on every device one
    /// whose bytes no number of this machine counts.
    pub(super) fn expect_room(&self) -> Result<()> {
        let MaeConfig { dim, decoder_dim, depth, decoder_depth, mlp_ratio, .. } = *self.config;
        // No less than the activations' bytes: of a block a token keeps 8 + 2 mlp_ratio times its width and some statistics.
        let of_token =
            (dim.max(decoder_dim) * (mlp_ratio + 16) * (depth + decoder_depth)) as f64 * 16.0;
        let of_patch = of_token + (64 * self.config.patch_numbers()) as f64;
        let images = self.settings.micro_batch as f64;
        if images * (1 + self.config.patches()) as f64 * of_patch > MOST_BYTES {
            let why = format!("is {images}, which no memory holds for this network; lower it");
            return Err(Error::invalid("optim.micro_batch", why));
        }
        let Device::Cuda(gpu) = self.dev else { return Ok(()) };
        let free = gpu.available_bytes()?;
        let room = free - free / SPARE_SHARE;
        let needs = |images: usize| (self.bytes(images) + self.batch_bytes(images)) as u64;
        let fits = |images: usize| needs(images) <= room;
        let asked = self.settings.micro_batch;
        if fits(asked) {
            return Ok(());
        }
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let cure = match std::iter::successors(Some(asked / 2), |m| Some(m / 2))
            .take_while(|&m| m > 0)
            .find(|&m| fits(m))
        {
            Some(m) => format!("{m} fits"),
            None => "not even 1 image fits: use a smaller network".into(),
        };
        let why = format!(
            "is {asked}, which needs {:.2} GiB of the {:.2} GiB that are free on the GPU; {cure}",
            gib(needs(asked)),
            gib(free)
        );
        Err(Error::invalid("optim.micro_batch", why))
    }
}
