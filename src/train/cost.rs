//! What a training step must move and compute, op by op as [`super::step`] calls them.

use super::step::Trainer;
use crate::model::activations::Batch;
use crate::model::cost::forward_backward;
use crate::ops::cost::{self, Cost, InputTarget};

/// Of a step of so many micro-batches: [`Trainer::accumulate`] as often, and [`Trainer::update`]. Its operations over its
/// time are the model's FLOP/s.
#[must_use]
pub fn step(trainer: &Trainer, micro_batches: usize) -> Cost {
    let (settings, config, dtype) = (trainer.settings(), trainer.mae.config(), trainer.mae.dtype());
    let (images, kept, pixels) = (settings.micro_batch, settings.kept, trainer.pixel_dtype());
    let masked = config.patches() - kept;
    let batch = Batch { images, kept, predicted: masked };
    let sizes = [images, config.image_size, config.patch_size, kept];
    let (wide, parameters) = (dtype.wide(), trainer.mae.table().parameters());
    let (target, filter) = match settings.radius {
        Some(radius) => (
            InputTarget::Filtered(pixels),
            cost::low_freq_target_forward([pixels, wide], sizes, radius),
        ),
        None => (InputTarget::Raw, Cost::default()),
    };
    let micro_batch = cost::random_masking_forward([images, config.patches()])
        + cost::input_forward(dtype, sizes, target)
        + filter
        + forward_backward(config, batch, dtype)
        + cost::masked_mse_loss_forward_backward(dtype, [images, masked, config.patch_numbers()]);
    let rounded = (dtype != wide).then_some(dtype);
    micro_batch * micro_batches
        + cost::grad_norm_forward(wide, parameters)
        + cost::adamw_update(wide, parameters, rounded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MaeConfig;
    use crate::train::step::Settings;
    use crate::{DType, Device};

    fn trainer(radius: Option<f64>) -> Trainer {
        let config = MaeConfig {
            image_size: 12,
            patch_size: 4,
            dim: 20,
            depth: 3,
            heads: 5,
            decoder_dim: 12,
            decoder_depth: 2,
            decoder_heads: 3,
            mlp_ratio: 2,
        };
        let settings = Settings {
            micro_batch: 7,
            radius,
            norm_pix: true,
            kept: 2,
            mask_block: 1,
            resize: None,
            mean: [0.5; 3],
            std: [0.25; 3],
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.05,
            decay_tokens: false,
            clip: 0.0,
            seed: 0,
            record: true,
        };
        Trainer::new(Device::cpu(), config, DType::F32, settings).unwrap()
    }

    #[test]
    fn a_step_has_the_products_of_its_passes_and_of_the_filter_for_each_micro_batch() {
        let (mae, pixmim) = (trainer(None), trainer(Some(3.0)));
        let batch = Batch { images: 7, kept: 2, predicted: 7 };
        let pass = forward_backward(mae.mae.config(), batch, DType::F32).flops;
        assert_eq!([1, 3].map(|n| step(&mae, n).flops), [pass, 3 * pass]);
        let filter = cost::low_freq_target_forward([DType::F32; 2], [7, 12, 4, 2], 3.0).flops;
        assert!(filter > 0);
        assert_eq!(step(&pixmim, 3).flops, 3 * (pass + filter));
    }

    #[test]
    fn weights_are_updated_once_however_many_micro_batches() {
        let mae = trainer(None);
        let [one, two, three] = [1, 2, 3].map(|n| step(&mae, n).bytes);
        assert_eq!(three - two, two - one);
        // Weight and both moments, read and written; the gradient, for its norm too: 4 bytes each.
        assert_eq!(2 * one - two, 4 * 8 * mae.mae.table().parameters() as u64);
    }
}
