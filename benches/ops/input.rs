//! From bytes to patches: with the pixels of the whole crop (PixMIM), and with the masked patches (MAE).

use criterion::Criterion;
use pixmim::ops::input::{self, Forward, GEOMETRY_FIELDS, Target};
use pixmim::{DType, Device, TensorRef};

use crate::workload::{Images, MEAN_STD};
use crate::{Masks, WORKLOADS, bytes, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    for w in WORKLOADS {
        let (masks, images) = (Masks::new(&w), Images::new(&w));
        let (numbers, side) = (w.config.patch_numbers(), w.config.image_size);
        let mut patches = zeros(DType::F32, &[w.images, w.kept(), numbers]);
        let mut target = zeros(DType::F32, &[w.images, w.config.patches() - w.kept(), numbers]);
        let mut pixels = zeros(DType::F32, &[w.images, 3, side, side]);
        let source = zeros(DType::U8, &[images.pixels.len()]);
        for (what, work) in [
            ("filtered", bytes(&[&source, &patches, &pixels])),
            ("raw", bytes(&[&source, &patches, &target])),
        ] {
            time(criterion, "input", what, w.name, work, || {
                input::forward(
                    &Device::cpu(),
                    Forward {
                        patches: patches.view_mut(),
                        target: match what {
                            "filtered" => Target::Filtered { pixels: pixels.view_mut() },
                            _ => Target::Raw {
                                target: target.view_mut(),
                                ids_masked: masks.ids_masked.view(),
                            },
                        },
                        images: TensorRef::new(&images.pixels, &[images.pixels.len()])?,
                        geometry: TensorRef::new(&images.geometry, &[w.images, GEOMETRY_FIELDS])?,
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
