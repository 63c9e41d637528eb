//! Casts of as many numbers as a network has parameters.

use pixmim::DType;
use pixmim::ops::cast::{self, Forward};
use pixmim::ops::cost;

use super::parameters;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    for (shape, batch) in parameters(bench) {
        for (direction, from, to) in
            [("f32 to bf16", DType::F32, DType::Bf16), ("bf16 to f32", DType::Bf16, DType::F32)]
        {
            let case = Case {
                op: "cast",
                direction,
                shape,
                batch,
                precision: None,
                cost: cost::cast_forward([from, to], batch),
            };
            bench.time(case, |on| {
                let (inp, mut out) = (on.random(from, &[batch]), on.zeros(to, &[batch]));
                move |dev| cast::forward(dev, Forward { out: out.view_mut(), inp: inp.view() })
            });
        }
    }
}
