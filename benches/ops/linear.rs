//! The layers of a block: the two of the MLP, with GELU and with a residual; of the smaller networks also queries, keys and
//! values, and their projection with its residual.

use pixmim::ops::cost;
use pixmim::ops::linear::{self, Backward, Epilogue, Forward, GradInput, workspace_bytes};

use super::{Stack, stacks};
use crate::workload::Workload;
use crate::{Bench, Case, PRECISIONS};

pub(crate) fn bench(bench: &mut Bench) {
    for (place, w) in bench.networks.clone().into_iter().enumerate() {
        for stack in stacks(&w) {
            let (dim, hidden) = (stack.dim, w.config.mlp_ratio * stack.dim);
            let layers = [
                ("qkv", dim, 3 * dim),
                ("proj", dim, dim),
                ("fc1", dim, hidden),
                ("fc2", hidden, dim),
            ];
            // Of larger ones the first two tell nothing new.
            let skipped = if place > 1 { 2 } else { 0 };
            for (layer, inputs, outputs) in layers.into_iter().skip(skipped) {
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
    let rows = batch * stack.tokens;
    let (has_epilogue, has_gelu, after_gelu) = (layer != "qkv", layer == "fc1", layer == "fc2");
    let size = [rows, inputs, outputs];
    // In f32 the MLP alone.
    let skipped = usize::from(!has_gelu && !after_gelu);
    for precision in PRECISIONS.into_iter().skip(skipped) {
        let dtype = bench.dtype(precision);
        let case = Case {
            op: "linear",
            direction: "forward",
            shape,
            batch,
            precision: Some(precision),
            cost: cost::linear_forward(dtype, size, has_epilogue),
        };
        bench.time(case, |on| {
            let inp = on.random(dtype, &[rows, inputs]);
            let weight = on.random(dtype, &[outputs, inputs]);
            let bias = on.random(dtype, &[outputs]);
            // GELU's input, or the residual.
            let mut other = on.random(dtype, &[rows, outputs]);
            let mut out = on.zeros(dtype, &[rows, outputs]);
            move |dev| {
                let epilogue = match (has_epilogue, has_gelu) {
                    (false, _) => Epilogue::None,
                    (_, true) => Epilogue::Gelu(other.view_mut()),
                    (_, false) => Epilogue::Residual(other.view()),
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
            cost: cost::linear_backward(dtype, size, after_gelu),
        };
        bench.time(case, |on| {
            let inp = on.random(dtype, &[rows, inputs]);
            let weight = on.random(dtype, &[outputs, inputs]);
            let grad_out = on.random(dtype, &[rows, outputs]);
            let pre = after_gelu.then(|| on.random(dtype, &[rows, inputs]));
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
