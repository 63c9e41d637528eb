//! The layer norms of a block of the encoder and of the decoder.

use criterion::Criterion;
use pixmim::ops::layer_norm::{self, Backward, Forward, workspace_bytes};
use pixmim::{DType, Device};

use crate::{WORKLOADS, bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    let dev = Device::cpu();
    for w in WORKLOADS {
        for (stack, tokens, dim) in [
            ("encoder", 1 + w.kept(), w.config.dim),
            ("decoder", 1 + w.config.patches(), w.config.decoder_dim),
        ] {
            let shape = format!("{} {stack}", w.name);
            let rows = [w.images, tokens];
            let full = [w.images, tokens, dim];
            let (inp, weight, bias) = (random(&full), random(&[dim]), random(&[dim]));
            let mut out = zeros(DType::F32, &full);
            let (mut mean, mut rstd) = (zeros(DType::F32, &rows), zeros(DType::F32, &rows));
            let work = bytes(&[&inp, &out, &mean, &rstd]);
            time(criterion, "layer_norm", "forward", &shape, work, || {
                layer_norm::forward(
                    &dev,
                    Forward {
                        out: out.view_mut(),
                        mean: mean.view_mut(),
                        rstd: rstd.view_mut(),
                        inp: inp.view(),
                        weight: weight.view(),
                        bias: bias.view(),
                        eps: 1e-6,
                    },
                )
            });
            let grad_out = random(&full);
            let mut grad_inp = zeros(DType::F32, &full);
            let mut grad_weight = zeros(DType::F32, &[dim]);
            let mut grad_bias = zeros(DType::F32, &[dim]);
            let mut workspace = zeros(
                DType::U8,
                &[workspace_bytes(&Device::cpu(), DType::F32, w.images * tokens, dim)],
            );
            // `grad_inp` accumulates: it is read and written.
            let work = bytes(&[&inp, &grad_out, &grad_inp, &grad_inp, &mean, &rstd]);
            time(criterion, "layer_norm", "backward", &shape, work, || {
                layer_norm::backward(
                    &dev,
                    Backward {
                        grad_inp: grad_inp.view_mut(),
                        grad_weight: grad_weight.view_mut(),
                        grad_bias: grad_bias.view_mut(),
                        grad_out: grad_out.view(),
                        inp: inp.view(),
                        mean: mean.view(),
                        rstd: rstd.view(),
                        weight: weight.view(),
                        workspace: workspace.view_mut(),
                    },
                )
            });
        }
    }
}
