//! One update of as many parameters as the small network has, and as one block of ViT-B's encoder has.

use criterion::Criterion;
use pixmim::model::params::Table;
use pixmim::ops::adamw::{self, Update};
use pixmim::{DType, Device};

use crate::workload::{SMALL64, VIT_B};
use crate::{bytes, random, time, zeros};

/// Lengths of vectors of parameters: of the small network, and of a block of ViT-B's encoder (four layers and two
/// layer norms). All 112 million of ViT-B, with moments and gradients, would take 1.8 GB.
pub(crate) fn sizes() -> [(&'static str, usize); 2] {
    let dim = VIT_B.config.dim;
    [
        ("small64", Table::new(&SMALL64.config).parameters()),
        ("vit_b block", 12 * dim * dim + 13 * dim),
    ]
}

pub(crate) fn bench(criterion: &mut Criterion) {
    for (name, elems) in sizes() {
        let (mut param, grad) = (random(&[elems]), random(&[elems]));
        let mut exp_avg = zeros(DType::F32, &[elems]);
        let mut exp_avg_sq = zeros(DType::F32, &[elems]);
        // Taken, not clipped, the first of a run.
        let values = [1.0f32, 1.0, 1e-3, 4.5, 1e-4];
        let mut coefficients = zeros(DType::F32, &[adamw::COEFFICIENTS]);
        coefficients.view_mut().into_slice::<f32>().copy_from_slice(&values);
        let work = bytes(&[&param, &param, &exp_avg, &exp_avg, &exp_avg_sq, &exp_avg_sq, &grad]);
        time(criterion, "adamw", "update", name, work, || {
            adamw::update(
                &Device::cpu(),
                Update {
                    param: param.view_mut(),
                    copy: None,
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
