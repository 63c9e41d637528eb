//! The low-pass filter over whole crops, as training in each precision has it: on a GPU exact in f32 and fast in
//! bf16.

use pixmim::ops::cost;
use pixmim::ops::low_freq_target::{self, Filter, Forward, workspace_bytes};
use pixmim::{DType, Device};

use super::has_own_decoder;
use crate::inputs::Masks;
use crate::workload::{MEAN_STD, Precision};
use crate::{Bench, Case, PRECISIONS};

pub(crate) fn bench(bench: &mut Bench) {
    for w in bench.networks.clone().into_iter().filter(has_own_decoder) {
        let (batch, kept, radius) = (w.images, w.kept(), w.radius());
        let (side, patch_size) = (w.config.image_size, w.config.patch_size);
        let (masked, numbers) = (w.config.patches() - kept, w.config.patch_numbers());
        for precision in PRECISIONS {
            let (dtype, exact) = (bench.dtype(precision), precision == Precision::F32);
            let pixel_dtype = if let Device::Cuda(_) = bench.dev { DType::U8 } else { dtype };
            let case = Case {
                op: "low_freq_target",
                direction: "forward",
                shape: w.name,
                batch,
                precision: Some(precision),
                cost: cost::low_freq_target_forward(
                    [pixel_dtype, dtype.wide()],
                    [batch, side, patch_size, kept],
                    radius,
                ),
            };
            bench.time(case, |on| {
                let masks = Masks::drawn(on, &w);
                let filter = Filter::new(on.dev, side, radius).unwrap();
                let mut target = on.zeros(dtype.wide(), &[batch, masked, numbers]);
                let pixels = on.random(pixel_dtype, &[batch, 3, side, side]);
                let bytes = workspace_bytes(on.dev, pixel_dtype, batch, &filter, exact);
                let mut workspace = on.workspace(bytes);
                move |dev| {
                    low_freq_target::forward(
                        dev,
                        Forward {
                            target: target.view_mut(),
                            pixels: pixels.view(),
                            ids_masked: masks.ids_masked.view(),
                            filter: &filter,
                            mean: MEAN_STD.0,
                            std: MEAN_STD.1,
                            patch_size,
                            exact,
                            workspace: workspace.view_mut(),
                        },
                    )
                }
            });
        }
    }
}
