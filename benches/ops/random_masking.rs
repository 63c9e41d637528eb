//! Drawing the masks of a batch.

use criterion::{Criterion, Throughput};
use pixmim::ops::random_masking::{self, Forward, Noise};
use pixmim::{DType, Device, Result, Tensor, TensorRef};

use crate::workload::Workload;
use crate::{Masks, WORKLOADS, time, zeros};

pub(crate) fn workspace(workload: &Workload) -> Tensor {
    let bytes =
        random_masking::workspace_bytes(&Device::cpu(), workload.images, workload.config.patches());
    zeros(DType::U8, &[bytes])
}

pub(crate) fn draw(w: &Workload, masks: &mut Masks, workspace: &mut Tensor) -> Result<()> {
    let samples: Vec<i64> = (0..w.images as i64).collect();
    random_masking::forward(
        &Device::cpu(),
        Forward {
            ids_keep: masks.ids_keep.view_mut(),
            ids_masked: masks.ids_masked.view_mut(),
            ids_restore: masks.ids_restore.view_mut(),
            noise: Noise::Drawn {
                seed: 0,
                epoch: TensorRef::new(&[0], &[1])?,
                samples: TensorRef::new(&samples, &[w.images])?,
            },
            block: 1,
            workspace: workspace.view_mut(),
        },
    )
}

pub(crate) fn bench(criterion: &mut Criterion) {
    for w in WORKLOADS {
        let (mut masks, mut workspace) = (Masks::zeros(&w), workspace(&w));
        // Patches in a second, not operations: they are sorted.
        let work = Throughput::Elements((w.images * w.config.patches()) as u64);
        time(criterion, "random_masking", "forward", w.name, work, || {
            draw(&w, &mut masks, &mut workspace)
        });
    }
}
