//! The widest layers of a block: the first of the MLP with its GELU, the second with its residual.

use criterion::Criterion;
use pixmim::DType;
use pixmim::ops::linear::{self, Backward, Epilogue, Forward, GradInput};

use crate::{PRODUCTS, WORKLOADS, flops, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    for w in WORKLOADS {
        for (stack, tokens, dim) in [
            ("encoder", 1 + w.kept(), w.config.dim),
            ("decoder", 1 + w.config.patches(), w.config.decoder_dim),
        ] {
            let (rows, hidden) = (w.images * tokens, w.config.mlp_ratio * dim);
            for (layer, inputs, outputs) in [("fc1", dim, hidden), ("fc2", hidden, dim)] {
                let shape = format!("{} {stack} {layer}", w.name);
                let inp = random(&[rows, inputs]);
                let (weight, bias) = (random(&[outputs, inputs]), random(&[outputs]));
                let residual = random(&[rows, outputs]);
                let mut pre = zeros(DType::F32, &[rows, outputs]);
                let mut out = zeros(DType::F32, &[rows, outputs]);
                let mut grad_inp = zeros(DType::F32, &[rows, inputs]);
                let mut grad_weight = zeros(DType::F32, &[outputs, inputs]);
                let mut grad_bias = zeros(DType::F32, &[outputs]);
                let mut workspace = zeros(DType::U8, &[0]);
                for (products, dev) in PRODUCTS {
                    let what = format!("forward {products}");
                    let work = flops(1, rows, inputs, outputs);
                    time(criterion, "linear", &what, &shape, work, || {
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
                    let what = format!("backward {products}");
                    let work = flops(2, rows, inputs, outputs);
                    time(criterion, "linear", &what, &shape, work, || {
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
