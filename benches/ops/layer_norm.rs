//! The layer norms of a block of the encoder and of the decoder.

use pixmim::ops::cost;
use pixmim::ops::layer_norm::{self, Backward, Forward, workspace_bytes};

use super::{Stack, stacks};
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    for w in bench.moved() {
        for Stack { name, tokens, dim, .. } in stacks(&w) {
            let (shape, batch) = (&format!("{} {name}", w.name), w.images);
            let rows = batch * tokens;
            let case = Case {
                op: "layer_norm",
                direction: "forward",
                shape,
                batch,
                precision: None,
                cost: cost::layer_norm_forward(dtype, [rows, dim]),
            };
            bench.time(case, |on| {
                let inp = on.random(dtype, &[rows, dim]);
                let (weight, bias) = (on.random(dtype, &[dim]), on.random(dtype, &[dim]));
                let mut out = on.zeros(dtype, &[rows, dim]);
                let mut mean = on.zeros(dtype.wide(), &[rows]);
                let mut rstd = on.zeros(dtype.wide(), &[rows]);
                move |dev| {
                    layer_norm::forward(
                        dev,
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
                }
            });
            let case = Case {
                op: "layer_norm",
                direction: "backward",
                shape,
                batch,
                precision: None,
                cost: cost::layer_norm_backward(dtype, [rows, dim]),
            };
            bench.time(case, |on| {
                let inp = on.random(dtype, &[rows, dim]);
                let grad_out = on.random(dtype, &[rows, dim]);
                let weight = on.random(dtype, &[dim]);
                // Whatever the statistics, it takes as long.
                let mean = on.random(dtype.wide(), &[rows]);
                let rstd = on.random(dtype.wide(), &[rows]);
                let mut grad_inp = on.zeros(dtype, &[rows, dim]);
                let mut grad_weight = on.zeros(dtype.wide(), &[dim]);
                let mut grad_bias = on.zeros(dtype.wide(), &[dim]);
                let mut workspace = on.workspace(workspace_bytes(on.dev, dtype, rows, dim));
                move |dev| {
                    layer_norm::backward(
                        dev,
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
                }
            });
        }
    }
}
