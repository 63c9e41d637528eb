//! From bytes to patches: with the pixels of the whole crop (PixMIM), and with the masked patches (MAE).

use pixmim::ops::input::{self, Forward, GEOMETRY_FIELDS, Target};
use pixmim::{DType, Device};

use crate::workload::{Images, MEAN_STD};
use crate::{Bench, Masks, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    for w in bench.workloads.clone() {
        let (masks, images) = (Masks::new(bench, &w), Images::new(&w));
        let (numbers, side) = (w.config.patch_numbers(), w.config.image_size);
        let mut patches = bench.zeros(dtype, &[w.images, w.kept(), numbers]);
        let shape = [w.images, w.config.patches() - w.kept(), numbers];
        let mut target = bench.zeros(dtype.wide(), &shape);
        let pixel_dtype = if let Device::Cuda(_) = dev { DType::U8 } else { dtype };
        let mut pixels = bench.zeros(pixel_dtype, &[w.images, 3, side, side]);
        let source = bench.holding(&images.pixels, &[images.pixels.len()]);
        let geometry = bench.holding(&images.geometry, &[w.images, GEOMETRY_FIELDS]);
        for (what, work) in [
            ("filtered", bytes(&[&source, &patches, &pixels])),
            ("raw", bytes(&[&source, &patches, &target])),
        ] {
            bench.time("input", what, w.name, work, || {
                input::forward(
                    &dev,
                    Forward {
                        patches: patches.view_mut(),
                        target: match what {
                            "filtered" => Target::Filtered { pixels: pixels.view_mut() },
                            _ => Target::Raw {
                                target: target.view_mut(),
                                ids_masked: masks.ids_masked.view(),
                            },
                        },
                        images: source.view(),
                        geometry: geometry.view(),
                        ids_keep: masks.ids_keep.view(),
                        mean: MEAN_STD.0,
                        std: MEAN_STD.1,
                        patch_size: w.config.patch_size,
                    },
                )
            });
        }
    }
}
