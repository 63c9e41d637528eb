//! The ops of a transformer.

use pixmim_core::ops::linear::{Epilogue, GradInput};
use pixmim_core::ops::{attention, gelu, layer_norm, linear};

use super::*;

const ROWS: [usize; 2] = [B, 1 + K];

pub(super) fn transformer(lab: &Lab) -> Vec<Case> {
    let (real, wide) = (lab.real, lab.real.wide());
    let rows = |width| [B, 1 + K, width];
    vec![
        case!(
            pixmim_layer_norm_forward {
                context: context(lab),
                out: lab.out(real, &rows(D)),
                mean: lab.out(wide, &ROWS),
                rstd: lab.out(wide, &ROWS),
                inp: lab.inp(real, &rows(D)),
                weight: lab.inp(real, &[D]),
                bias: lab.inp(real, &[D]),
                eps: number(1e-6),
                stream: stream(),
            },
            |v| {
                layer_norm::forward(
                    v.dev,
                    layer_norm::Forward {
                        out: v.out("out"),
                        mean: v.out("mean"),
                        rstd: v.out("rstd"),
                        inp: v.inp("inp"),
                        weight: v.inp("weight"),
                        bias: v.inp("bias"),
                        eps: v.f64("eps"),
                    },
                )
            }
        ),
        case!(
            pixmim_layer_norm_backward {
                context: context(lab),
                grad_inp: lab.out(real, &rows(D)),
                grad_weight: lab.out(wide, &[D]),
                grad_bias: lab.out(wide, &[D]),
                grad_out: lab.inp(real, &rows(D)),
                inp: lab.inp(real, &rows(D)),
                mean: lab.inp(wide, &ROWS),
                rstd: lab.inp(wide, &ROWS),
                weight: lab.inp(real, &[D]),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                layer_norm::backward(
                    v.dev,
                    layer_norm::Backward {
                        grad_inp: v.out("grad_inp"),
                        grad_weight: v.out("grad_weight"),
                        grad_bias: v.out("grad_bias"),
                        grad_out: v.inp("grad_out"),
                        inp: v.inp("inp"),
                        mean: v.inp("mean"),
                        rstd: v.inp("rstd"),
                        weight: v.inp("weight"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_attention_forward {
                context: context(lab),
                out: lab.out(real, &rows(D)),
                lse: lab.out(wide, &[B, NH, 1 + K]),
                qkv: lab.inp(real, &rows(3 * D)),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                attention::forward(
                    v.dev,
                    attention::Forward {
                        out: v.out("out"),
                        lse: v.out("lse"),
                        qkv: v.inp("qkv"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_attention_backward {
                context: context(lab),
                grad_qkv: lab.out(real, &rows(3 * D)),
                grad_out: lab.inp(real, &rows(D)),
                out: lab.inp(real, &rows(D)),
                lse: lab.inp(wide, &[B, NH, 1 + K]),
                qkv: lab.inp(real, &rows(3 * D)),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                attention::backward(
                    v.dev,
                    attention::Backward {
                        grad_qkv: v.out("grad_qkv"),
                        grad_out: v.inp("grad_out"),
                        out: v.inp("out"),
                        lse: v.inp("lse"),
                        qkv: v.inp("qkv"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_linear_forward {
                context: context(lab),
                out: lab.out(real, &rows(N)),
                pre: Arg::NoTensor,
                inp: lab.inp(real, &rows(D)),
                weight: lab.inp(real, &[N, D]),
                bias: lab.inp(real, &[N]),
                residual: lab.inp(real, &rows(N)),
                stream: stream(),
            },
            |v| {
                linear::forward(
                    v.dev,
                    linear::Forward {
                        out: v.out("out"),
                        inp: v.inp("inp"),
                        weight: v.inp("weight"),
                        bias: v.inp("bias"),
                        epilogue: Epilogue::Residual(v.inp("residual")),
                    },
                )
            }
        ),
        case!(
            pixmim_linear_forward {
                context: context(lab),
                out: lab.out(real, &rows(N)),
                pre: lab.out(real, &rows(N)),
                inp: lab.inp(real, &rows(D)),
                weight: lab.inp(real, &[N, D]),
                bias: lab.inp(real, &[N]),
                residual: Arg::NoTensor,
                stream: stream(),
            },
            |v| {
                linear::forward(
                    v.dev,
                    linear::Forward {
                        out: v.out("out"),
                        inp: v.inp("inp"),
                        weight: v.inp("weight"),
                        bias: v.inp("bias"),
                        epilogue: Epilogue::Gelu(v.out("pre")),
                    },
                )
            }
        ),
        case!(
            pixmim_linear_forward {
                context: context(lab),
                out: lab.out(real, &rows(N)),
                pre: Arg::NoTensor,
                inp: lab.inp(real, &rows(D)),
                weight: lab.inp(real, &[N, D]),
                bias: lab.inp(real, &[N]),
                residual: Arg::NoTensor,
                stream: stream(),
            },
            |v| {
                linear::forward(
                    v.dev,
                    linear::Forward {
                        out: v.out("out"),
                        inp: v.inp("inp"),
                        weight: v.inp("weight"),
                        bias: v.inp("bias"),
                        epilogue: Epilogue::None,
                    },
                )
            }
        ),
        case!(
            pixmim_linear_backward {
                context: context(lab),
                grad_inp: lab.out(real, &rows(D)),
                grad_weight: lab.out(wide, &[N, D]),
                grad_bias: lab.out(wide, &[N]),
                grad_out: lab.inp(real, &rows(N)),
                inp: lab.inp(real, &rows(D)),
                weight: lab.inp(real, &[N, D]),
                pre: lab.inp(real, &rows(D)),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                linear::backward(
                    v.dev,
                    linear::Backward {
                        grad_inp: GradInput::Gelu { grad: v.out("grad_inp"), pre: v.inp("pre") },
                        grad_weight: v.out("grad_weight"),
                        grad_bias: v.out("grad_bias"),
                        grad_out: v.inp("grad_out"),
                        inp: v.inp("inp"),
                        weight: v.inp("weight"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_linear_backward {
                context: context(lab),
                grad_inp: lab.out(real, &rows(D)),
                grad_weight: lab.out(wide, &[N, D]),
                grad_bias: lab.out(wide, &[N]),
                grad_out: lab.inp(real, &rows(N)),
                inp: lab.inp(real, &rows(D)),
                weight: lab.inp(real, &[N, D]),
                pre: Arg::NoTensor,
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                linear::backward(
                    v.dev,
                    linear::Backward {
                        grad_inp: GradInput::Plain(v.out("grad_inp")),
                        grad_weight: v.out("grad_weight"),
                        grad_bias: v.out("grad_bias"),
                        grad_out: v.inp("grad_out"),
                        inp: v.inp("inp"),
                        weight: v.inp("weight"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_linear_backward {
                context: context(lab),
                grad_inp: Arg::NoTensor,
                grad_weight: lab.out(wide, &[N, D]),
                grad_bias: lab.out(wide, &[N]),
                grad_out: lab.inp(real, &rows(N)),
                inp: lab.inp(real, &rows(D)),
                weight: lab.inp(real, &[N, D]),
                pre: Arg::NoTensor,
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                linear::backward(
                    v.dev,
                    linear::Backward {
                        grad_inp: GradInput::None,
                        grad_weight: v.out("grad_weight"),
                        grad_bias: v.out("grad_bias"),
                        grad_out: v.inp("grad_out"),
                        inp: v.inp("inp"),
                        weight: v.inp("weight"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_gelu_forward {
                context: context(lab),
                out: lab.out(real, &rows(D)),
                inp: lab.inp(real, &rows(D)),
                stream: stream(),
            },
            |v| { gelu::forward(v.dev, gelu::Forward { out: v.out("out"), inp: v.inp("inp") }) }
        ),
        case!(
            pixmim_gelu_backward {
                context: context(lab),
                grad_inp: lab.out(real, &rows(D)),
                grad_out: lab.inp(real, &rows(D)),
                inp: lab.inp(real, &rows(D)),
                stream: stream(),
            },
            |v| {
                gelu::backward(
                    v.dev,
                    gelu::Backward {
                        grad_inp: v.out("grad_inp"),
                        grad_out: v.inp("grad_out"),
                        inp: v.inp("inp"),
                    },
                )
            }
        ),
    ]
}
