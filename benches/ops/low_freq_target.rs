//! The low-pass filter over whole crops.

use criterion::{Criterion, Throughput};
use pixmim::ops::low_freq_target::{self, Filter, Forward};
use pixmim::{DType, Device};

use crate::workload::MEAN_STD;
use crate::{Masks, WORKLOADS, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    for w in WORKLOADS {
        let side = w.config.image_size;
        let masks = Masks::new(&w);
        let filter = Filter::new(&Device::cpu(), side, w.radius()).unwrap();
        let masked = w.config.patches() - w.kept();
        let mut target = zeros(DType::F32, &[w.images, masked, w.config.patch_numbers()]);
        let pixels = random(&[w.images, 3, side, side]);
        let workspace =
            low_freq_target::workspace_bytes(&Device::cpu(), DType::F32, w.images, &filter, true);
        let mut workspace = zeros(DType::U8, &[workspace]);
        // n kept frequencies an axis: rows to two parts, columns and back on stacked parts, rows back from four.
        let n = (0..side).filter(|&f| ((f as f64 + 0.5).powi(2) + 0.25) <= w.radius().powi(2));
        let n = 2 * n.count();
        let per_channel = 2 * side * side * n + 2 * (2 * n * 2 * side * n) + 4 * side * n * side;
        let work = Throughput::Elements((2 * 3 * w.images * per_channel) as u64);
        time(criterion, "low_freq_target", "forward", w.name, work, || {
            low_freq_target::forward(
                &Device::cpu(),
                Forward {
                    target: target.view_mut(),
                    pixels: pixels.view(),
                    ids_masked: masks.ids_masked.view(),
                    filter: &filter,
                    mean: MEAN_STD.0,
                    std: MEAN_STD.1,
                    patch_size: w.config.patch_size,
                    exact: true,
                    workspace: workspace.view_mut(),
                },
            )
        });
    }
}
