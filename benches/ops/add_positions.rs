//! The rows that the decoder's tokens are put together from.

use pixmim::ops::add_positions::{self, Backward, Forward, workspace_bytes};

use crate::{Bench, Masks, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    for w in bench.workloads.clone() {
        let (images, dim, patches) = (w.images, w.config.decoder_dim, w.config.patches());
        let masks = Masks::new(bench, &w);
        let inp = bench.random(dtype, &[images, 1 + w.kept(), dim]);
        let (mask_token, pos_embed) =
            (bench.random(dtype, &[dim]), bench.random(dtype, &[1 + patches, dim]));
        let mut out = bench.zeros(dtype, &[images * (1 + w.kept()) + patches, dim]);
        let work = bytes(&[&inp, &pos_embed, &out]);
        bench.time("add_positions", "forward", w.name, work, || {
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
        let grad_fill = bench.random(dtype, &[patches, dim]);
        let mut grad_mask_token = bench.zeros(dtype.wide(), &[dim]);
        let mut workspace = bench.workspace(workspace_bytes(&dev, patches, dim));
        let work = bytes(&[&grad_fill]);
        bench.time("add_positions", "backward", w.name, work, || {
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
