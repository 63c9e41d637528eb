//! The rows that the decoder's tokens are put together from.

use criterion::Criterion;
use pixmim::ops::add_positions::{self, Backward, Forward, workspace_bytes};
use pixmim::{DType, Device};

use crate::{Masks, WORKLOADS, bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    let dev = Device::cpu();
    for w in WORKLOADS {
        let (images, dim, patches) = (w.images, w.config.decoder_dim, w.config.patches());
        let masks = Masks::new(&w);
        let inp = random(&[images, 1 + w.kept(), dim]);
        let (mask_token, pos_embed) = (random(&[dim]), random(&[1 + patches, dim]));
        let mut out = zeros(DType::F32, &[images * (1 + w.kept()) + patches, dim]);
        let work = bytes(&[&inp, &pos_embed, &out]);
        time(criterion, "add_positions", "forward", w.name, work, || {
            add_positions::forward(
                &dev,
                Forward {
                    out: out.view_mut(),
                    inp: inp.view(),
                    ids_keep: masks.ids_keep.view(),
                    mask_token: mask_token.view(),
                    pos_embed: pos_embed.view(),
                },
            )
        });
        let grad_fill = random(&[patches, dim]);
        let mut grad_mask_token = zeros(DType::F32, &[dim]);
        let mut workspace = zeros(DType::U8, &[workspace_bytes(&dev, patches, dim)]);
        let work = bytes(&[&grad_fill]);
        time(criterion, "add_positions", "backward", w.name, work, || {
            add_positions::backward(
                &dev,
                Backward {
                    grad_mask_token: grad_mask_token.view_mut(),
                    grad_fill: grad_fill.view(),
                    workspace: workspace.view_mut(),
                },
            )
        });
    }
}
