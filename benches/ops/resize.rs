//! From rectangles to crops, of one and a half times their side: 336 for 224, about what Random Resized Crop takes of a
//! photo of ImageNet.

use pixmim::DType;
use pixmim::ops::cost;
use pixmim::ops::input::GEOMETRY_FIELDS;
use pixmim::ops::resize::{self, Forward, Interpolation};

use super::has_own_decoder;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    for w in bench.moved().into_iter().filter(has_own_decoder) {
        let (batch, side) = (w.images, w.config.image_size);
        let from = 3 * side / 2;
        for (direction, interpolation) in
            [("bicubic", Interpolation::Bicubic), ("bilinear", Interpolation::Bilinear)]
        {
            let case = Case {
                op: "resize",
                direction,
                shape: w.name,
                batch,
                precision: None,
                cost: cost::resize_forward([batch, side], batch * from * from),
            };
            bench.time(case, |on| {
                let bytes = 3 * from * from;
                let row = |i| [i * bytes, from, from, 0, 0, i % 2].map(|word| word as i64);
                let rows: Vec<_> = (0..batch).flat_map(row).collect();
                let images = on.random(DType::U8, &[batch * bytes]);
                let geometry = on.holding(&rows, &[batch, GEOMETRY_FIELDS]);
                let mut crops = on.zeros(DType::U8, &[batch, side, side, 3]);
                move |dev| {
                    resize::forward(
                        dev,
                        Forward {
                            crops: crops.view_mut(),
                            images: images.view(),
                            geometry: geometry.view(),
                            interpolation,
                        },
                    )
                }
            });
        }
    }
}
