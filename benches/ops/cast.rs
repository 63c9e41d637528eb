//! Casts of as many numbers as the small network has parameters, and as one block of ViT-B's encoder has.

use criterion::Criterion;
use pixmim::ops::cast::{self, Forward};
use pixmim::{DType, Device};

use crate::adamw::sizes;
use crate::{bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    let dev = Device::cpu();
    for (name, elems) in sizes() {
        let mut wide = random(&[elems]);
        let mut narrow = zeros(DType::Bf16, &[elems]);
        time(criterion, "cast", "f32 to bf16", name, bytes(&[&wide, &narrow]), || {
            cast::forward(&dev, Forward { out: narrow.view_mut(), inp: wide.view() })
        });
        time(criterion, "cast", "bf16 to f32", name, bytes(&[&wide, &narrow]), || {
            cast::forward(&dev, Forward { out: wide.view_mut(), inp: narrow.view() })
        });
    }
}
