//! The ops of masked image modelling.

use pixmim_core::ops::input::Target;
use pixmim_core::ops::random_masking::Noise;
use pixmim_core::ops::resize::Interpolation;
use pixmim_core::ops::{
    add_positions, gather_tokens, input, low_freq_target, masked_mse_loss, patch_embed,
    random_masking, resize, restore_tokens,
};

use super::*;

pub(super) fn images(lab: &Lab) -> Vec<Case> {
    let (real, wide) = (lab.real, lab.real.wide());
    let pixels = if lab.is_cpu() { real } else { DType::U8 };
    let patch_rows = [B, 1 + K, D];
    let colours = (|| numbers([0.485, 0.456, 0.406]), || numbers([0.229, 0.224, 0.225]));
    let mut cases = vec![
        case!(
            pixmim_random_masking_forward {
                context: context(lab),
                ids_keep: lab.out(DType::I32, &[B, K]),
                ids_masked: lab.out(DType::I32, &[B, M]),
                ids_restore: lab.out(DType::I32, &[B, L]),
                seed: int(11),
                epoch: lab.holding(DType::I64, &[1], &[3]),
                samples: lab.holding(DType::I64, &[B], &[5, 1, 1 << 40]),
                block: int(1),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                random_masking::forward(
                    v.dev,
                    random_masking::Forward {
                        ids_keep: v.out("ids_keep"),
                        ids_masked: v.out("ids_masked"),
                        ids_restore: v.out("ids_restore"),
                        noise: Noise::Drawn {
                            seed: v.size("seed") as u64,
                            epoch: v.inp("epoch"),
                            samples: v.inp("samples"),
                        },
                        block: v.size("block"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_resize_forward {
                context: context(lab),
                crops: lab.out(DType::U8, &[B, SIDE, SIDE, 3]),
                images: lab.inp(DType::U8, &[IMAGE_BYTES]),
                geometry: lab.holding(DType::I64, &[B, 6], &WHOLE),
                interpolation: int(PIXMIM_BILINEAR.into()),
                stream: stream(),
            },
            |v| {
                resize::forward(
                    v.dev,
                    resize::Forward {
                        crops: v.out("crops"),
                        images: v.inp("images"),
                        geometry: v.inp("geometry"),
                        interpolation: Interpolation::Bilinear,
                    },
                )
            }
        ),
        case!(
            pixmim_input_forward {
                context: context(lab),
                patches: lab.out(real, &[B, K, E]),
                target: Arg::NoTensor,
                pixels: lab.out(pixels, &[B, 3, SIDE, SIDE]),
                images: lab.inp(DType::U8, &[IMAGE_BYTES]),
                geometry: lab.holding(DType::I64, &[B, 6], &GEOMETRY),
                ids_keep: ids(lab, 0..K),
                ids_masked: Arg::NoTensor,
                mean: colours.0(),
                std: colours.1(),
                patch_size: int(P as i64),
                stream: stream(),
            },
            |v| {
                input::forward(
                    v.dev,
                    input::Forward {
                        patches: v.out("patches"),
                        target: Target::Filtered { pixels: v.out("pixels") },
                        images: v.inp("images"),
                        geometry: v.inp("geometry"),
                        ids_keep: v.inp("ids_keep"),
                        mean: v.three("mean"),
                        std: v.three("std"),
                        patch_size: v.size("patch_size"),
                    },
                )
            }
        ),
        case!(
            pixmim_input_forward {
                context: context(lab),
                patches: lab.out(real, &[B, K, E]),
                target: lab.out(wide, &[B, M, E]),
                pixels: Arg::NoTensor,
                images: lab.inp(DType::U8, &[IMAGE_BYTES]),
                geometry: lab.holding(DType::I64, &[B, 6], &GEOMETRY),
                ids_keep: ids(lab, 0..K),
                ids_masked: ids(lab, K..L),
                mean: colours.0(),
                std: colours.1(),
                patch_size: int(P as i64),
                stream: stream(),
            },
            |v| {
                input::forward(
                    v.dev,
                    input::Forward {
                        patches: v.out("patches"),
                        target: Target::Raw {
                            target: v.out("target"),
                            ids_masked: v.inp("ids_masked"),
                        },
                        images: v.inp("images"),
                        geometry: v.inp("geometry"),
                        ids_keep: v.inp("ids_keep"),
                        mean: v.three("mean"),
                        std: v.three("std"),
                        patch_size: v.size("patch_size"),
                    },
                )
            }
        ),
        case!(
            pixmim_low_freq_target_forward {
                context: context(lab),
                target: lab.out(wide, &[B, M, E]),
                pixels: lab.inp(pixels, &[B, 3, SIDE, SIDE]),
                ids_masked: ids(lab, K..L),
                filter: lab.filter(),
                mean: colours.0(),
                std: colours.1(),
                patch_size: int(P as i64),
                exact: int(1),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                low_freq_target::forward(
                    v.dev,
                    low_freq_target::Forward {
                        target: v.out("target"),
                        pixels: v.inp("pixels"),
                        ids_masked: v.inp("ids_masked"),
                        filter: &v.lab.rust_filter,
                        mean: v.three("mean"),
                        std: v.three("std"),
                        patch_size: v.size("patch_size"),
                        exact: true,
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_masked_mse_loss_forward_backward {
                context: context(lab),
                loss: lab.out(wide, &[1]),
                grad_pred: lab.out(real, &[B, M, E]),
                pred: lab.inp(real, &[B, M, E]),
                target: lab.inp(wide, &[B, M, E]),
                norm_pix: int(1),
                scale: number(0.5),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                masked_mse_loss::forward_backward(
                    v.dev,
                    masked_mse_loss::ForwardBackward {
                        loss: v.out("loss"),
                        grad_pred: v.out("grad_pred"),
                        pred: v.inp("pred"),
                        target: v.inp("target"),
                        norm_pix: true,
                        scale: v.f64("scale"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_patch_embed_forward {
                context: context(lab),
                out: lab.out(real, &patch_rows),
                patches: lab.inp(real, &[B, K, E]),
                ids_keep: ids(lab, 0..K),
                weight: lab.inp(real, &[D, E]),
                bias: lab.inp(real, &[D]),
                cls_token: lab.inp(real, &[D]),
                pos_embed: lab.inp(real, &[1 + L, D]),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                patch_embed::forward(
                    v.dev,
                    patch_embed::Forward {
                        out: v.out("out"),
                        patches: v.inp("patches"),
                        ids_keep: v.inp("ids_keep"),
                        weight: v.inp("weight"),
                        bias: v.inp("bias"),
                        cls_token: v.inp("cls_token"),
                        pos_embed: v.inp("pos_embed"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_patch_embed_backward {
                context: context(lab),
                grad_weight: lab.out(wide, &[D, E]),
                grad_bias: lab.out(wide, &[D]),
                grad_cls_token: lab.out(wide, &[D]),
                grad_out: lab.inp(real, &patch_rows),
                patches: lab.inp(real, &[B, K, E]),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                patch_embed::backward(
                    v.dev,
                    patch_embed::Backward {
                        grad_weight: v.out("grad_weight"),
                        grad_bias: v.out("grad_bias"),
                        grad_cls_token: v.out("grad_cls_token"),
                        grad_out: v.inp("grad_out"),
                        patches: v.inp("patches"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_add_positions_forward {
                context: context(lab),
                out: lab.out(real, &[B * (1 + K) + L, D]),
                inp: lab.inp(real, &patch_rows),
                ids_keep: ids(lab, 0..K),
                mask_token: lab.inp(real, &[D]),
                pos_embed: lab.inp(real, &[1 + L, D]),
                stream: stream(),
            },
            |v| {
                add_positions::forward(
                    v.dev,
                    add_positions::Forward {
                        out: v.out("out"),
                        inp: v.inp("inp"),
                        ids_keep: v.inp("ids_keep"),
                        mask_token: v.inp("mask_token"),
                        pos_embed: v.inp("pos_embed"),
                    },
                )
            }
        ),
        case!(
            pixmim_add_positions_backward {
                context: context(lab),
                grad_mask_token: lab.out(wide, &[D]),
                grad_fill: lab.inp(real, &[L, D]),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                add_positions::backward(
                    v.dev,
                    add_positions::Backward {
                        grad_mask_token: v.out("grad_mask_token"),
                        grad_fill: v.inp("grad_fill"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ),
        case!(
            pixmim_restore_tokens_forward {
                context: context(lab),
                out: lab.out(real, &[B, 1 + L, D]),
                inp: lab.inp(real, &patch_rows),
                fill: lab.inp(real, &[L, D]),
                ids_restore: ids_restore(lab),
                stream: stream(),
            },
            |v| {
                restore_tokens::forward(
                    v.dev,
                    restore_tokens::Forward {
                        out: v.out("out"),
                        inp: v.inp("inp"),
                        fill: v.inp("fill"),
                        ids_restore: v.inp("ids_restore"),
                    },
                )
            }
        ),
        case!(
            pixmim_restore_tokens_backward {
                context: context(lab),
                grad_inp: lab.out(real, &patch_rows),
                grad_fill: lab.out(real, &[L, D]),
                grad_out: lab.inp(real, &[B, 1 + L, D]),
                ids_restore: ids_restore(lab),
                stream: stream(),
            },
            |v| {
                restore_tokens::backward(
                    v.dev,
                    restore_tokens::Backward {
                        grad_inp: v.out("grad_inp"),
                        grad_fill: v.out("grad_fill"),
                        grad_out: v.inp("grad_out"),
                        ids_restore: v.inp("ids_restore"),
                    },
                )
            }
        ),
        case!(
            pixmim_gather_tokens_forward {
                context: context(lab),
                out: lab.out(real, &[B, M, D]),
                inp: lab.inp(real, &[B, 1 + L, D]),
                ids_masked: ids(lab, K..L),
                stream: stream(),
            },
            |v| {
                gather_tokens::forward(
                    v.dev,
                    gather_tokens::Forward {
                        out: v.out("out"),
                        inp: v.inp("inp"),
                        ids_masked: v.inp("ids_masked"),
                    },
                )
            }
        ),
        case!(
            pixmim_gather_tokens_backward {
                context: context(lab),
                grad_inp: lab.out(real, &[B, 1 + L, D]),
                grad_out: lab.inp(real, &[B, M, D]),
                ids_restore: ids_restore(lab),
                stream: stream(),
            },
            |v| {
                gather_tokens::backward(
                    v.dev,
                    gather_tokens::Backward {
                        grad_inp: v.out("grad_inp"),
                        grad_out: v.inp("grad_out"),
                        ids_restore: v.inp("ids_restore"),
                    },
                )
            }
        ),
    ];
    if lab.is_cpu() {
        cases.push(case!(
            pixmim_random_masking_from_noise {
                context: context(lab),
                ids_keep: lab.out(DType::I32, &[B, K]),
                ids_masked: lab.out(DType::I32, &[B, M]),
                ids_restore: lab.out(DType::I32, &[B, L]),
                noise: lab.inp(DType::F64, &[B, 4]),
                block: int(2),
                workspace: Arg::Workspace(None),
                workspace_bytes: place(8),
                stream: stream(),
            },
            |v| {
                random_masking::forward(
                    v.dev,
                    random_masking::Forward {
                        ids_keep: v.out("ids_keep"),
                        ids_masked: v.out("ids_masked"),
                        ids_restore: v.out("ids_restore"),
                        noise: Noise::Given(v.inp("noise")),
                        block: v.size("block"),
                        workspace: v.out("workspace"),
                    },
                )
            }
        ));
    }
    cases
}
