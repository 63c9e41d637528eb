//! The pictures of a run: the same images, crops and masks each time.

use std::borrow::Cow;

use crate::data::augment::{self, Geometry};
use crate::data::loader;
use crate::data::source::Source;
use crate::model::Activations;
use crate::model::activations::Batch;
use crate::ops::low_freq_target::{self, Filter};
use crate::ops::{input, random_masking};
use crate::scalar::patch_of;
use crate::train::config::{Config, Resolved, Target};
use crate::train::pictures::{self, Picture, Reconstruction, Settings};
use crate::train::step::Trainer;
use crate::{Arena, DType, Result, Tensor};

/// What the network is shown, and its place to answer.
pub(super) struct Gallery {
    /// None if no image could be read.
    shown: Option<Shown>,
    config: Config,
    target: String,
}

struct Shown {
    acts: Activations,
    workspace: Tensor,
    /// Pixels, target and mask of each image; the prediction is filled in when drawn.
    images: Vec<Reconstruction>,
}

impl Gallery {
    /// Chooses `log.picture_images` images by the seed and prepares them; unreadable ones are passed over.
    pub(super) fn new(
        config: &Config,
        resolved: &Resolved,
        source: &Source,
        trainer: &Trainer,
    ) -> Result<Self> {
        let filter = match config.method.target {
            Target::LowFreq => {
                Some(Filter::new(trainer.device(), config.model.image_size, resolved.radius)?)
            }
            Target::Raw => None,
        };
        let target = match &filter {
            Some(filter) => format!("low-pass r={:.1}", filter.radius()),
            None => "raw pixels".to_owned(),
        };
        let shown = Shown::new(config, source, trainer, filter.as_ref())?;
        Ok(Self { shown, config: config.clone(), target })
    }

    /// What the network makes of the images now.
    pub(super) fn draw(&mut self, trainer: &Trainer, step: u64) -> Result<Option<Picture>> {
        let Some(Shown { acts, workspace, images }) = &mut self.shown else { return Ok(None) };
        trainer.mae.forward(trainer.device(), acts, workspace)?;
        let pred = trainer.device().read_f32(acts.pred.view())?;
        let numbers = pred.len() / images.len();
        for (image, pred) in images.iter_mut().zip(pred.chunks_exact(numbers)) {
            image.prediction.clear();
            image.prediction.extend_from_slice(pred);
        }
        let settings = Settings {
            image_size: self.config.model.image_size,
            patch_size: self.config.model.patch_size,
            mean: self.config.data.mean.map(|x| x as f32),
            std: self.config.data.std.map(|x| x as f32),
            norm_pix: self.config.method.norm_pix,
            target: &self.target,
        };
        pictures::draw(&settings, step, images).map(Some)
    }
}

impl Shown {
    fn new(
        config: &Config,
        source: &Source,
        trainer: &Trainer,
        filter: Option<&Filter>,
    ) -> Result<Option<Self>> {
        let (dev, mae) = (trainer.device(), trainer.mae.config());
        let (side, seed) = (mae.image_size, config.runtime.seed);
        // Any fixed order serves; this one does not show the first files of the first folder only.
        let order = loader::order(seed, u32::MAX, source.len());
        let mut samples: Vec<i64> = Vec::new();
        let mut bytes = Vec::new();
        let mut geometry = Vec::new();
        for sample in order.into_iter().map(|sample| sample as usize) {
            if samples.len() == config.log.picture_images {
                break;
            }
            // The loader reports what cannot be read.
            let Ok(image) = source.read(sample) else { continue };
            let (image, crop) = augment::center(&image, side, config.method.interpolation);
            geometry.push(Geometry { offset: bytes.len() as i64, ..crop });
            bytes.extend_from_slice(&image.pixels);
            samples.push(sample as i64);
        }
        let images = samples.len();
        if images == 0 {
            return Ok(None);
        }
        let (dtype, pixel_dtype) = (trainer.mae.dtype(), trainer.pixel_dtype());
        let (patches, kept) = (mae.patches(), config.kept_patches());
        let (patch_size, numbers) = (mae.patch_size, mae.patch_numbers());
        let batch = Batch { images, kept, predicted: patches };
        let mut needed = trainer.mae.workspace_bytes(dev, batch);
        if let Some(filter) = filter {
            needed =
                needed.max(low_freq_target::workspace_bytes(dev, DType::F32, images, filter, true));
        }
        let ((mut acts, mut workspace, mut masked, mut pixels, mut target), _) =
            Arena::build(dev, "pictures", |arena| {
                (
                    Activations::new(arena, dtype, mae, batch),
                    arena.tensor(DType::U8, &[needed]),
                    arena.tensor(DType::I32, &[images, patches - kept]),
                    arena.tensor(pixel_dtype, &[images, 3, side, side]),
                    arena.tensor(dtype.wide(), &[images, patches, numbers]),
                )
            })?;
        let epoch = Tensor::holding(dev, &[i64::from(u32::MAX)], &[1])?;
        let samples = Tensor::holding(dev, &samples, &[images])?;
        input::check_geometry(&geometry, bytes.len(), side)?;
        let bytes = Tensor::holding(dev, &bytes, &[bytes.len()])?;
        let geometry: &[i64] = bytemuck::cast_slice(&geometry);
        let geometry = Tensor::holding(dev, geometry, &[images, input::GEOMETRY_FIELDS])?;
        random_masking::forward(
            dev,
            random_masking::Forward {
                ids_keep: acts.ids_keep.view_mut(),
                ids_masked: masked.view_mut(),
                ids_restore: acts.ids_restore.view_mut(),
                noise: random_masking::Noise::Drawn {
                    seed,
                    epoch: epoch.view(),
                    samples: samples.view(),
                },
                block: config.method.mask_block,
                workspace: workspace.view_mut(),
            },
        )?;
        // Every patch is predicted, to show the seen ones too.
        let all: Vec<_> = (0..images * patches).map(|i| (i % patches) as i32).collect();
        dev.upload(acts.ids_predicted.view_mut(), &all)?;
        input::forward(
            dev,
            input::Forward {
                patches: acts.patches.view_mut(),
                target: input::Target::Filtered { pixels: pixels.view_mut() },
                images: bytes.view(),
                geometry: geometry.view(),
                ids_keep: acts.ids_keep.view(),
                mean: config.data.mean,
                std: config.data.std,
                patch_size,
            },
        )?;
        if let Some(filter) = filter {
            low_freq_target::forward(
                dev,
                low_freq_target::Forward {
                    target: target.view_mut(),
                    pixels: pixels.view(),
                    ids_masked: acts.ids_predicted.view(),
                    filter,
                    // Colours on [0, 1], as they are shown.
                    mean: [0.0; 3],
                    std: [1.0; 3],
                    patch_size,
                    exact: true,
                    workspace: workspace.view_mut(),
                },
            )?;
        }
        let pixels = match pixel_dtype {
            DType::U8 => {
                let bytes = dev.read::<u8>(pixels.view())?;
                Cow::Owned(bytes.iter().map(|&x| f32::from(x) / 255.0).collect())
            }
            _ => dev.read::<f32>(pixels.view())?,
        };
        // Without a filter nothing was written there.
        let target = match filter {
            Some(_) => dev.read::<f32>(target.view())?,
            None => Cow::Owned(vec![0.0; images * patches * numbers]),
        };
        let restore = dev.read::<i32>(acts.ids_restore.view())?;
        let images = (0..images)
            .map(|b| {
                let planes = &pixels[b * 3 * side * side..][..3 * side * side];
                let pixels: Vec<f32> =
                    (0..3 * side * side).map(|i| planes[i % 3 * side * side + i / 3]).collect();
                let patched = &target[b * patches * numbers..][..patches * numbers];
                let target = match filter {
                    Some(_) => unpatchify(patched, side, patch_size),
                    None => pixels.clone(),
                };
                let places = &restore[b * patches..][..patches];
                let masked = places.iter().map(|&place| place as usize >= kept).collect();
                Reconstruction { pixels, target, masked, prediction: Vec::new() }
            })
            .collect();
        Ok(Some(Self { acts, workspace, images }))
    }
}

/// `(L, P P 3)` patches, (row, column, channel), as an image `(S, S, 3)`.
fn unpatchify(patches: &[f32], side: usize, patch_size: usize) -> Vec<f32> {
    let grid = side / patch_size;
    (0..3 * side * side)
        .map(|i| {
            let (y, x, c) = (i / 3 / side, i / 3 % side, i % 3);
            let patch = patch_of(y, x, grid, patch_size);
            let inside = (y % patch_size * patch_size + x % patch_size) * 3 + c;
            patches[patch * 3 * patch_size * patch_size + inside]
        })
        .collect()
}
