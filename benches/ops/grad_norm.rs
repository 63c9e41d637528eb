//! Norm of as many gradients as the small network has, and as one block of ViT-B's encoder has.

use criterion::Criterion;
use pixmim::ops::grad_norm::{self, Forward, workspace_bytes};
use pixmim::{DType, Device};

use crate::adamw::sizes;
use crate::{bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    for (name, elems) in sizes() {
        let grad = random(&[elems]);
        let mut norm = zeros(DType::F32, &[1]);
        let mut workspace = zeros(DType::U8, &[workspace_bytes(&Device::cpu(), elems)]);
        time(criterion, "grad_norm", "forward", name, bytes(&[&grad]), || {
            grad_norm::forward(
                &Device::cpu(),
                Forward {
                    norm: norm.view_mut(),
                    grad: grad.view(),
                    workspace: workspace.view_mut(),
                },
            )
        });
    }
}
