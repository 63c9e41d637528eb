//! The ops of the optimizer, and those that know no network.

use pixmim_core::ops::{adamw, cast, grad_norm};

use super::*;

/// Parameters.
const COUNT: usize = 1037;

pub(super) fn optimizer(lab: &Lab) -> Vec<Case> {
    let wide = lab.real.wide();
    vec![
        case!(
            pixmim_grad_norm_forward {
                context: context(lab),
                norm: lab.out(wide, &[1]),
                grad: lab.inp(wide, &[COUNT]),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                grad_norm::forward(
                    v.dev,
                    grad_norm::Forward {
                        norm: v.out("norm"),
                        grad: v.inp("grad"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_adamw_prepare {
                context: context(lab),
                coefficients: lab.out(wide, &[5]),
                step: lab.out(DType::I64, &[1]),
                lr: lab.inp(DType::F64, &[1]),
                loss: lab.inp(wide, &[1]),
                grad_norm: lab.inp(wide, &[1]),
                clip: number(0.5),
                beta1: number(0.9),
                beta2: number(0.95),
                stream: stream(),
            },
            |v| {
                adamw::prepare(
                    v.dev,
                    adamw::Prepare {
                        coefficients: v.out("coefficients"),
                        step: v.out("step"),
                        lr: v.inp("lr"),
                        loss: v.inp("loss"),
                        grad_norm: v.inp("grad_norm"),
                        clip: v.f64("clip"),
                        betas: [v.f64("beta1"), v.f64("beta2")],
                    },
                )
            }
        ),
        case!(
            pixmim_adamw_update {
                context: context(lab),
                param: lab.out(wide, &[COUNT]),
                copy: lab.out(DType::Bf16, &[COUNT]),
                exp_avg: lab.out(wide, &[COUNT]),
                exp_avg_sq: lab.out(wide, &[COUNT]),
                grad: lab.inp(wide, &[COUNT]),
                coefficients: lab.inp(wide, &[5]),
                beta1: number(0.9),
                beta2: number(0.95),
                eps: number(1e-8),
                weight_decay: number(0.05),
                stream: stream(),
            },
            |v| {
                adamw::update(
                    v.dev,
                    adamw::Update {
                        param: v.out("param"),
                        copy: Some(v.out("copy")),
                        exp_avg: v.out("exp_avg"),
                        exp_avg_sq: v.out("exp_avg_sq"),
                        grad: v.inp("grad"),
                        coefficients: v.inp("coefficients"),
                        betas: [v.f64("beta1"), v.f64("beta2")],
                        eps: v.f64("eps"),
                        weight_decay: v.f64("weight_decay"),
                    },
                )
            }
        ),
        case!(
            pixmim_cast_forward {
                context: context(lab),
                out: lab.out(DType::Bf16, &[B, D]),
                inp: lab.inp(DType::F32, &[B, D]),
                stream: stream(),
            },
            |v| { cast::forward(v.dev, cast::Forward { out: v.out("out"), inp: v.inp("inp") }) }
        ),
    ]
}
