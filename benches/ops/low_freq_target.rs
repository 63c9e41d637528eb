//! The low-pass filter over whole crops.

use pixmim::ops::low_freq_target::{self, Filter, Forward, workspace_bytes};
use pixmim::{DType, Device};

use crate::workload::MEAN_STD;
use crate::{Bench, Masks, products};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    // A GPU has a fast filter beside the exact one, for training in bf16.
    let (pixel_dtype, filters) = match dev {
        Device::Cuda(_) => (DType::U8, &[("forward", true), ("fast", false)][..]),
        _ => (dtype, &[("forward", true)][..]),
    };
    for w in bench.workloads.clone() {
        let side = w.config.image_size;
        let masks = Masks::new(bench, &w);
        let filter = Filter::new(&dev, side, w.radius()).unwrap();
        let masked = w.config.patches() - w.kept();
        let mut target = bench.zeros(dtype.wide(), &[w.images, masked, w.config.patch_numbers()]);
        let pixels = bench.random(pixel_dtype, &[w.images, 3, side, side]);
        // n kept frequencies an axis: rows to two parts, columns and back on stacked parts, rows back from four.
        let n = (0..side).filter(|&f| ((f as f64 + 0.5).powi(2) + 0.25) <= w.radius().powi(2));
        let n = 2 * n.count();
        let per_channel = 2 * side * side * n + 2 * (2 * n * 2 * side * n) + 4 * side * n * side;
        let work = products(3 * w.images, [per_channel, 1, 1], &[&pixels, &target]);
        for &(what, exact) in filters {
            let bytes = workspace_bytes(&dev, pixel_dtype, w.images, &filter, exact);
            let mut workspace = bench.workspace(bytes);
            bench.time("low_freq_target", what, w.name, work.clone(), || {
                low_freq_target::forward(
                    &dev,
                    Forward {
                        target: target.view_mut(),
                        pixels: pixels.view(),
                        ids_masked: masks.ids_masked.view(),
                        filter: &filter,
                        mean: MEAN_STD.0,
                        std: MEAN_STD.1,
                        patch_size: w.config.patch_size,
                        exact,
                        workspace: workspace.view_mut(),
                    },
                )
            });
        }
    }
}
