//! Norm of as many gradients as a network has.

use pixmim::DType;
use pixmim::ops::cost;
use pixmim::ops::grad_norm::{self, Forward, workspace_bytes};

use super::parameters;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    for (shape, batch) in parameters(bench) {
        let case = Case {
            op: "grad_norm",
            direction: "forward",
            shape,
            batch,
            precision: None,
            cost: cost::grad_norm_forward(DType::F32, batch),
        };
        bench.time(case, |on| {
            let (grad, mut norm) = (on.random(DType::F32, &[batch]), on.zeros(DType::F32, &[1]));
            let mut workspace = on.workspace(workspace_bytes(on.dev, batch));
            move |dev| {
                grad_norm::forward(
                    dev,
                    Forward {
                        norm: norm.view_mut(),
                        grad: grad.view(),
                        workspace: workspace.view_mut(),
                    },
                )
            }
        });
    }
}
