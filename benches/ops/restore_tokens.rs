//! The decoder's input, put together from kept and mask tokens.

use criterion::Criterion;
use pixmim::ops::restore_tokens::{self, Backward, Forward, workspace_bytes};
use pixmim::{DType, Device};

use crate::{Masks, WORKLOADS, bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    let dev = Device::cpu();
    for w in WORKLOADS {
        let (images, dim, rows) = (w.images, w.config.decoder_dim, 1 + w.config.patches());
        let masks = Masks::new(&w);
        let inp = random(&[images, 1 + w.kept(), dim]);
        let (mask_token, pos_embed) = (random(&[dim]), random(&[rows, dim]));
        let mut out = zeros(DType::F32, &[images, rows, dim]);
        let work = bytes(&[&inp, &out]);
        time(criterion, "restore_tokens", "forward", w.name, work, || {
            restore_tokens::forward(
                &dev,
                Forward {
                    out: out.view_mut(),
                    inp: inp.view(),
                    ids_restore: masks.ids_restore.view(),
                    mask_token: mask_token.view(),
                    pos_embed: pos_embed.view(),
                },
            )
        });
        let grad_out = random(&[images, rows, dim]);
        let mut grad_inp = zeros(DType::F32, &[images, 1 + w.kept(), dim]);
        let mut grad_mask_token = zeros(DType::F32, &[dim]);
        let mut workspace =
            zeros(DType::U8, &[workspace_bytes(&Device::cpu(), DType::F32, images, dim)]);
        let work = bytes(&[&grad_out, &grad_inp]);
        time(criterion, "restore_tokens", "backward", w.name, work, || {
            restore_tokens::backward(
                &dev,
                Backward {
                    grad_inp: grad_inp.view_mut(),
                    grad_mask_token: grad_mask_token.view_mut(),
                    grad_out: grad_out.view(),
                    ids_restore: masks.ids_restore.view(),
                    workspace: workspace.view_mut(),
                },
            )
        });
    }
}
