//! From bytes to patches: with the pixels of the whole crop (PixMIM), and with the masked patches (MAE).

use pixmim::ops::cost::{self, InputTarget};
use pixmim::ops::input::{self, Forward, GEOMETRY_FIELDS, Target};
use pixmim::{DType, Device};

use super::has_own_decoder;
use crate::inputs::Masks;
use crate::workload::{Images, MEAN_STD};
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    let pixel_dtype = if let Device::Cuda(_) = bench.dev { DType::U8 } else { dtype };
    for w in bench.moved().into_iter().filter(has_own_decoder) {
        let (batch, kept) = (w.images, w.kept());
        let (side, patch_size) = (w.config.image_size, w.config.patch_size);
        let (masked, numbers) = (w.config.patches() - kept, w.config.patch_numbers());
        for (direction, kind) in
            [("filtered", InputTarget::Filtered(pixel_dtype)), ("raw", InputTarget::Raw)]
        {
            let case = Case {
                op: "input",
                direction,
                shape: w.name,
                batch,
                precision: None,
                cost: cost::input_forward(dtype, [batch, side, patch_size, kept], kind),
            };
            bench.time(case, |on| {
                let (masks, images) = (Masks::drawn(on, &w), Images::new(&w));
                let source = on.holding(&images.pixels, &[images.pixels.len()]);
                let geometry = on.holding(&images.geometry, &[batch, GEOMETRY_FIELDS]);
                let mut patches = on.zeros(dtype, &[batch, kept, numbers]);
                let mut target = match kind {
                    InputTarget::Filtered(_) => on.zeros(pixel_dtype, &[batch, 3, side, side]),
                    InputTarget::Raw => on.zeros(dtype.wide(), &[batch, masked, numbers]),
                };
                move |dev| {
                    let target = target.view_mut();
                    input::forward(
                        dev,
                        Forward {
                            patches: patches.view_mut(),
                            target: match kind {
                                InputTarget::Filtered(_) => Target::Filtered { pixels: target },
                                InputTarget::Raw => {
                                    Target::Raw { target, ids_masked: masks.ids_masked.view() }
                                }
                            },
                            images: source.view(),
                            geometry: geometry.view(),
                            ids_keep: masks.ids_keep.view(),
                            mean: MEAN_STD.0,
                            std: MEAN_STD.1,
                            patch_size,
                        },
                    )
                }
            });
        }
    }
}
