//! Loss and gradient over the masked patches, with and without normalised targets.

use pixmim::ops::cost;
use pixmim::ops::masked_mse_loss::{self, ForwardBackward, workspace_bytes};

use super::has_own_decoder;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    for w in bench.moved().into_iter().filter(has_own_decoder) {
        let (batch, masked) = (w.images, w.config.patches() - w.kept());
        let shape = [batch, masked, w.config.patch_numbers()];
        for (direction, norm_pix) in [("norm_pix", true), ("plain", false)] {
            let case = Case {
                op: "masked_mse_loss",
                direction,
                shape: w.name,
                batch,
                precision: None,
                cost: cost::masked_mse_loss_forward_backward(dtype, shape),
            };
            bench.time(case, |on| {
                let (pred, target) = (on.random(dtype, &shape), on.random(dtype.wide(), &shape));
                let mut grad_pred = on.zeros(dtype, &shape);
                let mut loss = on.zeros(dtype.wide(), &[1]);
                let mut workspace = on.workspace(workspace_bytes(on.dev, dtype, batch * masked));
                move |dev| {
                    masked_mse_loss::forward_backward(
                        dev,
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
                }
            });
        }
    }
}
