//! One update of as many parameters as a network has, or a block of it.

use pixmim::DType;
use pixmim::ops::adamw::{self, Update};

use crate::{Bench, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let dev = bench.dev.clone();
    for (name, elems) in bench.parameters() {
        let mut param = bench.random(DType::F32, &[elems]);
        let grad = bench.random(DType::F32, &[elems]);
        let mut exp_avg = bench.zeros(DType::F32, &[elems]);
        let mut exp_avg_sq = bench.zeros(DType::F32, &[elems]);
        let mut copy = (bench.dtype == DType::Bf16).then(|| bench.zeros(bench.dtype, &[elems]));
        // Taken, not clipped, the first of a run.
        let values = [1.0f32, 1.0, 1e-3, 4.5, 1e-4];
        let coefficients = bench.holding(&values, &[adamw::COEFFICIENTS]);
        let mut passes = vec![&param, &param, &exp_avg, &exp_avg, &exp_avg_sq, &exp_avg_sq, &grad];
        passes.extend(&copy);
        let work = bytes(&passes);
        bench.time("adamw", "update", name, work, || {
            adamw::update(
                &dev,
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
        });
    }
}
