//! The widest layers of a block: the first of the MLP with its GELU, the second with its residual.

use pixmim::ops::cost;
use pixmim::ops::linear::{self, Backward, Epilogue, Forward, GradInput, workspace_bytes};

use super::{Stack, stacks};
use crate::workload::Workload;
use crate::{Bench, Case, PRECISIONS};

pub(crate) fn bench(bench: &mut Bench) {
    for w in bench.networks.clone() {
        for stack in stacks(&w) {
            let hidden = w.config.mlp_ratio * stack.dim;
            for (layer, inputs, outputs) in [("fc1", stack.dim, hidden), ("fc2", hidden, stack.dim)]
            {
                bench_layer(bench, &w, &stack, layer, [inputs, outputs]);
            }
        }
    }
}

fn bench_layer(
    bench: &mut Bench,
    w: &Workload,
    stack: &Stack,
    layer: &str,
    [inputs, outputs]: [usize; 2],
) {
    let (shape, batch) = (&format!("{} {} {layer}", w.name, stack.name), w.images);
    let (rows, is_first) = (batch * stack.tokens, layer == "fc1");
    let size = [rows, inputs, outputs];
    for precision in PRECISIONS {
        let dtype = bench.dtype(precision);
        let case = Case {
            op: "linear",
            direction: "forward",
            shape,
            batch,
            precision: Some(precision),
            cost: cost::linear_forward(dtype, size, true),
        };
        bench.time(case, |on| {
            let inp = on.random(dtype, &[rows, inputs]);
            let weight = on.random(dtype, &[outputs, inputs]);
            let bias = on.random(dtype, &[outputs]);
            // GELU's input, or the residual.
            let mut other = on.random(dtype, &[rows, outputs]);
            let mut out = on.zeros(dtype, &[rows, outputs]);
            move |dev| {
                let epilogue = if is_first {
                    Epilogue::Gelu(other.view_mut())
                } else {
                    Epilogue::Residual(other.view())
                };
                linear::forward(
                    dev,
                    Forward {
                        out: out.view_mut(),
                        inp: inp.view(),
                        weight: weight.view(),
                        bias: bias.view(),
                        epilogue,
                    },
                )
            }
        });
        let case = Case {
            op: "linear",
            direction: "backward",
            shape,
            batch,
            precision: Some(precision),
            cost: cost::linear_backward(dtype, size, !is_first),
        };
        bench.time(case, |on| {
            let inp = on.random(dtype, &[rows, inputs]);
            let weight = on.random(dtype, &[outputs, inputs]);
            let grad_out = on.random(dtype, &[rows, outputs]);
            let pre = (!is_first).then(|| on.random(dtype, &[rows, inputs]));
            let mut grad_inp = on.zeros(dtype, &[rows, inputs]);
            let mut grad_weight = on.zeros(dtype.wide(), &[outputs, inputs]);
            let mut grad_bias = on.zeros(dtype.wide(), &[outputs]);
            let mut workspace = on.workspace(workspace_bytes(on.dev, rows, outputs));
            move |dev| {
                let grad = grad_inp.view_mut();
                linear::backward(
                    dev,
                    Backward {
                        grad_inp: match &pre {
                            None => GradInput::Plain(grad),
                            Some(pre) => GradInput::Gelu { grad, pre: pre.view() },
                        },
                        grad_weight: grad_weight.view_mut(),
                        grad_bias: grad_bias.view_mut(),
                        grad_out: grad_out.view(),
                        inp: inp.view(),
                        weight: weight.view(),
                        workspace: workspace.view_mut(),
                    },
                )
            }
        });
    }
}
