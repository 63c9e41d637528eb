//! GELU over the hidden layer of an encoder block.

use pixmim::ops::gelu::{self, Backward, Forward};

use crate::{Bench, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    for w in bench.workloads.clone() {
        let shape = [w.images, 1 + w.kept(), w.config.mlp_ratio * w.config.dim];
        let (inp, grad_out) = (bench.random(dtype, &shape), bench.random(dtype, &shape));
        let mut out = bench.zeros(dtype, &shape);
        let work = bytes(&[&inp, &out]);
        bench.time("gelu", "forward", w.name, work, || {
            gelu::forward(&dev, Forward { out: out.view_mut(), inp: inp.view() })
        });
        let work = bytes(&[&inp, &grad_out, &out]);
        bench.time("gelu", "backward", w.name, work, || {
            gelu::backward(
                &dev,
                Backward { grad_inp: out.view_mut(), grad_out: grad_out.view(), inp: inp.view() },
            )
        });
    }
}
