//! One update of as many parameters as a network has.

use pixmim::DType;
use pixmim::ops::adamw::{self, Update};
use pixmim::ops::cost;

use super::parameters;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    let copied = (dtype == DType::Bf16).then_some(dtype);
    for (shape, batch) in parameters(bench) {
        let case = Case {
            op: "adamw",
            direction: "update",
            shape,
            batch,
            precision: None,
            cost: cost::adamw_update(DType::F32, batch, copied),
        };
        bench.time(case, |on| {
            let mut param = on.random(DType::F32, &[batch]);
            let grad = on.random(DType::F32, &[batch]);
            let mut exp_avg = on.zeros(DType::F32, &[batch]);
            let mut exp_avg_sq = on.zeros(DType::F32, &[batch]);
            let mut copy = copied.map(|dtype| on.zeros(dtype, &[batch]));
            // Taken, not clipped, the first of a run.
            let values = [1.0f32, 1.0, 1e-3, 4.5, 1e-4];
            let coefficients = on.holding(&values, &[adamw::COEFFICIENTS]);
            move |dev| {
                adamw::update(
                    dev,
                    Update {
                        param: param.view_mut(),
                        copy: copy.as_mut().map(|copy| copy.view_mut()),
                        exp_avg: exp_avg.view_mut(),
                        exp_avg_sq: exp_avg_sq.view_mut(),
                        grad: grad.view(),
                        coefficients: coefficients.view(),
                        betas: [0.9, 0.95],
                        eps: 1e-8,
                        weight_decay: 0.05,
                    },
                )
            }
        });
    }
}
