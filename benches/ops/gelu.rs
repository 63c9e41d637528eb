//! GELU over the hidden layer of an encoder block.

use pixmim::ops::cost;
use pixmim::ops::gelu::{self, Backward, Forward};

use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    for w in bench.moved() {
        let batch = w.images;
        let hidden = [batch, 1 + w.kept(), w.config.mlp_ratio * w.config.dim];
        let case = Case {
            op: "gelu",
            direction: "forward",
            shape: w.name,
            batch,
            precision: None,
            cost: cost::gelu_forward(dtype, hidden.iter().product()),
        };
        bench.time(case, |on| {
            let (inp, mut out) = (on.random(dtype, &hidden), on.zeros(dtype, &hidden));
            move |dev| gelu::forward(dev, Forward { out: out.view_mut(), inp: inp.view() })
        });
        let case = Case {
            op: "gelu",
            direction: "backward",
            shape: w.name,
            batch,
            precision: None,
            cost: cost::gelu_backward(dtype, hidden.iter().product()),
        };
        bench.time(case, |on| {
            let (inp, grad_out) = (on.random(dtype, &hidden), on.random(dtype, &hidden));
            let mut grad_inp = on.zeros(dtype, &hidden);
            move |dev| {
                gelu::backward(
                    dev,
                    Backward {
                        grad_inp: grad_inp.view_mut(),
                        grad_out: grad_out.view(),
                        inp: inp.view(),
                    },
                )
            }
        });
    }
}
