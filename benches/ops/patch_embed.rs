//! Embedding of the kept patches.

use pixmim::ops::patch_embed::{self, Backward, Forward, workspace_bytes};

use crate::{Bench, Masks, PRECISIONS, products};

pub(crate) fn bench(bench: &mut Bench) {
    for w in bench.workloads.clone() {
        let (images, kept) = (w.images, w.kept());
        let (dim, numbers) = (w.config.dim, w.config.patch_numbers());
        let masks = Masks::new(bench, &w);
        for (name, precision) in PRECISIONS {
            let (dev, dtype) = precision.on(&bench.dev);
            let patches = bench.random(dtype, &[images, kept, numbers]);
            let weight = bench.random(dtype, &[dim, numbers]);
            let bias = bench.random(dtype, &[dim]);
            let cls_token = bench.random(dtype, &[dim]);
            let pos_embed = bench.random(dtype, &[1 + w.config.patches(), dim]);
            let mut out = bench.zeros(dtype, &[images, 1 + kept, dim]);
            let grad_out = bench.random(dtype, &[images, 1 + kept, dim]);
            let mut grad_weight = bench.zeros(dtype.wide(), &[dim, numbers]);
            let mut grad_bias = bench.zeros(dtype.wide(), &[dim]);
            let mut grad_cls_token = bench.zeros(dtype.wide(), &[dim]);
            let mut workspace = bench.workspace(workspace_bytes(&dev, dtype, images, kept, dim));
            let size = [images * kept, numbers, dim];
            let work = products(1, size, &[&patches, &weight, &pos_embed, &out]);
            bench.time("patch_embed", &format!("forward {name}"), w.name, work, || {
                patch_embed::forward(
                    &dev,
                    Forward {
                        out: out.view_mut(),
                        patches: patches.view(),
                        ids_keep: masks.ids_keep.view(),
                        weight: weight.view(),
                        bias: bias.view(),
                        cls_token: cls_token.view(),
                        pos_embed: pos_embed.view(),
                        workspace: workspace.view_mut(),
                    },
                )
            });
            let work = products(1, size, &[&patches, &grad_out, &grad_weight, &grad_weight]);
            bench.time("patch_embed", &format!("backward {name}"), w.name, work, || {
                patch_embed::backward(
                    &dev,
                    Backward {
                        grad_weight: grad_weight.view_mut(),
                        grad_bias: grad_bias.view_mut(),
                        grad_cls_token: grad_cls_token.view_mut(),
                        grad_out: grad_out.view(),
                        patches: patches.view(),
                        workspace: workspace.view_mut(),
                    },
                )
            });
        }
    }
}
