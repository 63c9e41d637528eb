//! Loss and gradient over the masked patches, with and without normalised targets.

use criterion::Criterion;
use pixmim::ops::masked_mse_loss::{self, ForwardBackward, workspace_bytes};
use pixmim::{DType, Device};

use crate::{WORKLOADS, bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    for w in WORKLOADS {
        let masked = w.config.patches() - w.kept();
        let shape = [w.images, masked, w.config.patch_numbers()];
        let (pred, target) = (random(&shape), random(&shape));
        let mut grad_pred = zeros(DType::F32, &shape);
        let mut loss = zeros(DType::F32, &[1]);
        let mut workspace =
            zeros(DType::U8, &[workspace_bytes(&Device::cpu(), DType::F32, w.images * masked)]);
        for (what, norm_pix) in [("norm_pix", true), ("plain", false)] {
            let work = bytes(&[&pred, &target, &grad_pred]);
            time(criterion, "masked_mse_loss", what, w.name, work, || {
                masked_mse_loss::forward_backward(
                    &Device::cpu(),
                    ForwardBackward {
                        loss: loss.view_mut(),
                        grad_pred: grad_pred.view_mut(),
                        pred: pred.view(),
                        target: target.view(),
                        norm_pix,
                        scale: 1.0,
                        workspace: workspace.view_mut(),
                    },
                )
            });
        }
    }
}
