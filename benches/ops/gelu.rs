//! GELU over the hidden layer of an encoder block.

use criterion::Criterion;
use pixmim::ops::gelu::{self, Backward, Forward};
use pixmim::{DType, Device};

use crate::{WORKLOADS, bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    let dev = Device::cpu();
    for w in WORKLOADS {
        let shape = [w.images, 1 + w.kept(), w.config.mlp_ratio * w.config.dim];
        let (inp, grad_out) = (random(&shape), random(&shape));
        let mut out = zeros(DType::F32, &shape);
        let work = bytes(&[&inp, &out]);
        time(criterion, "gelu", "forward", w.name, work, || {
            gelu::forward(&dev, Forward { out: out.view_mut(), inp: inp.view() })
        });
        let work = bytes(&[&inp, &grad_out, &out]);
        time(criterion, "gelu", "backward", w.name, work, || {
            gelu::backward(
                &dev,
                Backward { grad_inp: out.view_mut(), grad_out: grad_out.view(), inp: inp.view() },
            )
        });
    }
}
