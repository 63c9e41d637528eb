//! Embedding of the kept patches.

use criterion::Criterion;
use pixmim::ops::patch_embed::{self, Backward, Forward, workspace_bytes};
use pixmim::{DType, Device};

use crate::{Masks, PRODUCTS, WORKLOADS, flops, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    for w in WORKLOADS {
        let (images, kept) = (w.images, w.kept());
        let (dim, numbers) = (w.config.dim, w.config.patch_numbers());
        let masks = Masks::new(&w);
        let patches = random(&[images, kept, numbers]);
        let (weight, bias) = (random(&[dim, numbers]), random(&[dim]));
        let (cls_token, pos_embed) = (random(&[dim]), random(&[1 + w.config.patches(), dim]));
        let mut out = zeros(DType::F32, &[images, 1 + kept, dim]);
        let grad_out = random(&[images, 1 + kept, dim]);
        let mut grad_weight = zeros(DType::F32, &[dim, numbers]);
        let mut grad_bias = zeros(DType::F32, &[dim]);
        let mut grad_cls_token = zeros(DType::F32, &[dim]);
        let mut workspace =
            zeros(DType::U8, &[workspace_bytes(&Device::cpu(), DType::F32, images, kept, dim)]);
        let work = || flops(1, images * kept, numbers, dim);
        for (products, dev) in PRODUCTS {
            let what = format!("forward {products}");
            time(criterion, "patch_embed", &what, w.name, work(), || {
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
            let what = format!("backward {products}");
            time(criterion, "patch_embed", &what, w.name, work(), || {
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
