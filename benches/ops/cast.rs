//! Casts of as many numbers as a network has parameters, or a block of it.

use pixmim::DType;
use pixmim::ops::cast::{self, Forward};

use crate::{Bench, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let dev = bench.dev.clone();
    for (name, elems) in bench.parameters() {
        let mut wide = bench.random(DType::F32, &[elems]);
        let mut narrow = bench.zeros(DType::Bf16, &[elems]);
        let work = bytes(&[&wide, &narrow]);
        bench.time("cast", "f32 to bf16", name, work.clone(), || {
            cast::forward(&dev, Forward { out: narrow.view_mut(), inp: wide.view() })
        });
        bench.time("cast", "bf16 to f32", name, work, || {
            cast::forward(&dev, Forward { out: wide.view_mut(), inp: narrow.view() })
        });
    }
}
