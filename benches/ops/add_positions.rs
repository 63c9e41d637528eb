//! The rows that the decoder's tokens are put together from.

use pixmim::ops::add_positions::{self, Backward, Forward, workspace_bytes};
use pixmim::ops::cost;

use super::has_own_decoder;
use crate::inputs::Masks;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    for w in bench.moved().into_iter().filter(has_own_decoder) {
        let (batch, kept) = (w.images, w.kept());
        let (patches, dim) = (w.config.patches(), w.config.decoder_dim);
        let case = Case {
            op: "add_positions",
            direction: "forward",
            shape: w.name,
            batch,
            precision: None,
            cost: cost::add_positions_forward(dtype, [batch, patches, kept, dim]),
        };
        bench.time(case, |on| {
            let masks = Masks::drawn(on, &w);
            let inp = on.random(dtype, &[batch, 1 + kept, dim]);
            let mask_token = on.random(dtype, &[dim]);
            let pos_embed = on.random(dtype, &[1 + patches, dim]);
            let mut out = on.zeros(dtype, &[batch * (1 + kept) + patches, dim]);
            move |dev| {
                add_positions::forward(
                    dev,
                    Forward {
                        out: out.view_mut(),
                        inp: inp.view(),
                        ids_keep: masks.ids_keep.view(),
                        mask_token: mask_token.view(),
                        pos_embed: pos_embed.view(),
                    },
                )
            }
        });
        let case = Case {
            op: "add_positions",
            direction: "backward",
            shape: w.name,
            batch,
            precision: None,
            cost: cost::add_positions_backward(dtype, [patches, dim]),
        };
        bench.time(case, |on| {
            let grad_fill = on.random(dtype, &[patches, dim]);
            let mut grad_mask_token = on.zeros(dtype.wide(), &[dim]);
            let mut workspace = on.workspace(workspace_bytes(on.dev, patches, dim));
            move |dev| {
                add_positions::backward(
                    dev,
                    Backward {
                        grad_mask_token: grad_mask_token.view_mut(),
                        grad_fill: grad_fill.view(),
                        workspace: workspace.view_mut(),
                    },
                )
            }
        });
    }
}
