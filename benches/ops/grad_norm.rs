//! Norm of as many gradients as a network has, or a block of it.

use pixmim::DType;
use pixmim::ops::grad_norm::{self, Forward, workspace_bytes};

use crate::{Bench, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let dev = bench.dev.clone();
    for (name, elems) in bench.parameters() {
        let grad = bench.random(DType::F32, &[elems]);
        let mut norm = bench.zeros(DType::F32, &[1]);
        let mut workspace = bench.workspace(workspace_bytes(&dev, elems));
        let work = bytes(&[&grad]);
        bench.time("grad_norm", "forward", name, work, || {
            grad_norm::forward(
                &dev,
                Forward {
                    norm: norm.view_mut(),
                    grad: grad.view(),
                    workspace: workspace.view_mut(),
                },
            )
        });
    }
}
