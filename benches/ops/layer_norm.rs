//! The layer norms of a block of the encoder and of the decoder.

use pixmim::ops::layer_norm::{self, Backward, Forward, workspace_bytes};

use crate::{Bench, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    for w in bench.workloads.clone() {
        for (stack, tokens, dim) in [
            ("encoder", 1 + w.kept(), w.config.dim),
            ("decoder", 1 + w.config.patches(), w.config.decoder_dim),
        ] {
            let shape = format!("{} {stack}", w.name);
            let rows = [w.images, tokens];
            let full = [w.images, tokens, dim];
            let (inp, weight, bias) = (
                bench.random(dtype, &full),
                bench.random(dtype, &[dim]),
                bench.random(dtype, &[dim]),
            );
            let mut out = bench.zeros(dtype, &full);
            let (mut mean, mut rstd) =
                (bench.zeros(dtype.wide(), &rows), bench.zeros(dtype.wide(), &rows));
            let work = bytes(&[&inp, &out, &mean, &rstd]);
            bench.time("layer_norm", "forward", &shape, work, || {
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
            let grad_out = bench.random(dtype, &full);
            let mut grad_inp = bench.zeros(dtype, &full);
            let mut grad_weight = bench.zeros(dtype.wide(), &[dim]);
            let mut grad_bias = bench.zeros(dtype.wide(), &[dim]);
            let mut workspace =
                bench.workspace(workspace_bytes(&dev, dtype, w.images * tokens, dim));
            // `grad_inp` accumulates: it is read and written.
            let work = bytes(&[&inp, &grad_out, &grad_inp, &grad_inp, &mean, &rstd]);
            bench.time("layer_norm", "backward", &shape, work, || {
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
