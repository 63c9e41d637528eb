//! Loss and gradient over the masked patches, with and without normalised targets.

use pixmim::ops::masked_mse_loss::{self, ForwardBackward, workspace_bytes};

use crate::{Bench, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    for w in bench.workloads.clone() {
        let masked = w.config.patches() - w.kept();
        let shape = [w.images, masked, w.config.patch_numbers()];
        let (pred, target) = (bench.random(dtype, &shape), bench.random(dtype.wide(), &shape));
        let mut grad_pred = bench.zeros(dtype, &shape);
        let mut loss = bench.zeros(dtype.wide(), &[1]);
        let mut workspace = bench.workspace(workspace_bytes(&dev, dtype, w.images * masked));
        for (what, norm_pix) in [("norm_pix", true), ("plain", false)] {
            let work = bytes(&[&pred, &target, &grad_pred]);
            bench.time("masked_mse_loss", what, w.name, work, || {
                masked_mse_loss::forward_backward(
                    &dev,
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
