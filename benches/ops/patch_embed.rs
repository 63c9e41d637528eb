//! Embedding of the kept patches.

use pixmim::ops::cost;
use pixmim::ops::patch_embed::{self, Backward, Forward, workspace_bytes};

use crate::inputs::Masks;
use crate::{Bench, Case, PRECISIONS};

pub(crate) fn bench(bench: &mut Bench) {
    for w in bench.networks.clone() {
        let (batch, kept, patches) = (w.images, w.kept(), w.config.patches());
        let (dim, numbers) = (w.config.dim, w.config.patch_numbers());
        for precision in PRECISIONS {
            let dtype = bench.dtype(precision);
            let case = Case {
                op: "patch_embed",
                direction: "forward",
                shape: w.name,
                batch,
                precision: Some(precision),
                cost: cost::patch_embed_forward(dtype, [batch, patches, kept, numbers, dim]),
            };
            bench.time(case, |on| {
                let masks = Masks::drawn(on, &w);
                let inp = on.random(dtype, &[batch, kept, numbers]);
                let weight = on.random(dtype, &[dim, numbers]);
                let (bias, cls_token) = (on.random(dtype, &[dim]), on.random(dtype, &[dim]));
                let pos_embed = on.random(dtype, &[1 + patches, dim]);
                let mut out = on.zeros(dtype, &[batch, 1 + kept, dim]);
                let mut workspace = on.workspace(workspace_bytes(on.dev, dtype, batch, kept, dim));
                move |dev| {
                    patch_embed::forward(
                        dev,
                        Forward {
                            out: out.view_mut(),
                            patches: inp.view(),
                            ids_keep: masks.ids_keep.view(),
                            weight: weight.view(),
                            bias: bias.view(),
                            cls_token: cls_token.view(),
                            pos_embed: pos_embed.view(),
                            workspace: workspace.view_mut(),
                        },
                    )
                }
            });
            let case = Case {
                op: "patch_embed",
                direction: "backward",
                shape: w.name,
                batch,
                precision: Some(precision),
                cost: cost::patch_embed_backward(dtype, [batch, kept, numbers, dim]),
            };
            bench.time(case, |on| {
                let inp = on.random(dtype, &[batch, kept, numbers]);
                let grad_out = on.random(dtype, &[batch, 1 + kept, dim]);
                let mut grad_weight = on.zeros(dtype.wide(), &[dim, numbers]);
                let mut grad_bias = on.zeros(dtype.wide(), &[dim]);
                let mut grad_cls_token = on.zeros(dtype.wide(), &[dim]);
                let mut workspace = on.workspace(workspace_bytes(on.dev, dtype, batch, kept, dim));
                move |dev| {
                    patch_embed::backward(
                        dev,
                        Backward {
                            grad_weight: grad_weight.view_mut(),
                            grad_bias: grad_bias.view_mut(),
                            grad_cls_token: grad_cls_token.view_mut(),
                            grad_out: grad_out.view(),
                            patches: inp.view(),
                            workspace: workspace.view_mut(),
                        },
                    )
                }
            });
        }
    }
}
