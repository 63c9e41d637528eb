//! Drawing the masks of a batch.

use pixmim::ops::random_masking::{self, Forward, Noise, workspace_bytes};
use pixmim::{Device, Result, Tensor};

use crate::workload::Workload;
use crate::{Bench, Masks, bytes};

/// What masks are drawn from.
pub(crate) struct Draw {
    epoch: Tensor,
    samples: Tensor,
    workspace: Tensor,
}

impl Draw {
    pub(crate) fn new(bench: &Bench, w: &Workload) -> Self {
        let samples: Vec<i64> = (0..w.images as i64).collect();
        let bytes = workspace_bytes(&bench.dev, w.images, w.config.patches());
        Self {
            epoch: bench.holding(&[0i64], &[1]),
            samples: bench.holding(&samples, &[w.images]),
            workspace: bench.workspace(bytes),
        }
    }

    pub(crate) fn draw(&mut self, dev: &Device, masks: &mut Masks) -> Result<()> {
        random_masking::forward(
            dev,
            Forward {
                ids_keep: masks.ids_keep.view_mut(),
                ids_masked: masks.ids_masked.view_mut(),
                ids_restore: masks.ids_restore.view_mut(),
                noise: Noise::Drawn {
                    seed: 0,
                    epoch: self.epoch.view(),
                    samples: self.samples.view(),
                },
                block: 1,
                workspace: self.workspace.view_mut(),
            },
        )
    }
}

pub(crate) fn bench(bench: &mut Bench) {
    let dev = bench.dev.clone();
    for w in bench.workloads.clone() {
        let (mut masks, mut draw) = (Masks::zeros(bench, &w), Draw::new(bench, &w));
        let work = bytes(&[&masks.ids_keep, &masks.ids_masked, &masks.ids_restore]);
        bench.time("random_masking", "forward", w.name, work, || draw.draw(&dev, &mut masks));
    }
}
