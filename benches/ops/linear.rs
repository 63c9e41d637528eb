//! The widest layers of a block: the first of the MLP with its GELU, the second with its residual.

use pixmim::ops::linear::{self, Backward, Epilogue, Forward, GradInput, workspace_bytes};

use crate::{Bench, PRECISIONS, products};

pub(crate) fn bench(bench: &mut Bench) {
    for w in bench.workloads.clone() {
        for (stack, tokens, dim) in [
            ("encoder", 1 + w.kept(), w.config.dim),
            ("decoder", 1 + w.config.patches(), w.config.decoder_dim),
        ] {
            let (rows, hidden) = (w.images * tokens, w.config.mlp_ratio * dim);
            for (layer, inputs, outputs) in [("fc1", dim, hidden), ("fc2", hidden, dim)] {
                for (name, precision) in PRECISIONS {
                    let (dev, dtype) = precision.on(&bench.dev);
                    let shape = format!("{} {stack} {layer}", w.name);
                    let inp = bench.random(dtype, &[rows, inputs]);
                    let weight = bench.random(dtype, &[outputs, inputs]);
                    let bias = bench.random(dtype, &[outputs]);
                    let residual = bench.random(dtype, &[rows, outputs]);
                    let mut pre = bench.zeros(dtype, &[rows, outputs]);
                    let mut out = bench.zeros(dtype, &[rows, outputs]);
                    let mut grad_inp = bench.zeros(dtype, &[rows, inputs]);
                    let mut grad_weight = bench.zeros(dtype.wide(), &[outputs, inputs]);
                    let mut grad_bias = bench.zeros(dtype.wide(), &[outputs]);
                    let mut workspace = bench.workspace(workspace_bytes(&dev, rows, outputs));
                    let size = [rows, inputs, outputs];
                    // `pre` written or `residual` read.
                    let work = products(1, size, &[&inp, &weight, &out, &pre]);
                    bench.time("linear", &format!("forward {name}"), &shape, work, || {
                        linear::forward(
                            &dev,
                            Forward {
                                out: out.view_mut(),
                                inp: inp.view(),
                                weight: weight.view(),
                                bias: bias.view(),
                                epilogue: match layer {
                                    "fc1" => Epilogue::Gelu(pre.view_mut()),
                                    _ => Epilogue::Residual(residual.view()),
                                },
                            },
                        )
                    });
                    let mut passes = vec![&inp, &residual, &weight, &grad_inp];
                    passes.extend([&grad_weight; 2]);
                    // The layer's input before its GELU, for whose slope `inp` stands in.
                    passes.extend((layer == "fc2").then_some(&inp));
                    let work = products(2, size, &passes);
                    bench.time("linear", &format!("backward {name}"), &shape, work, || {
                        linear::backward(
                            &dev,
                            Backward {
                                grad_inp: match layer {
                                    "fc1" => GradInput::Plain(grad_inp.view_mut()),
                                    _ => GradInput::Gelu {
                                        grad: grad_inp.view_mut(),
                                        pre: inp.view(),
                                    },
                                },
                                grad_weight: grad_weight.view_mut(),
                                grad_bias: grad_bias.view_mut(),
                                grad_out: residual.view(),
                                inp: inp.view(),
                                weight: weight.view(),
                                workspace: workspace.view_mut(),
                            },
                        )
                    });
                }
            }
        }
    }
}
