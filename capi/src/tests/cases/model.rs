//! Functions of a model, in the order in which a trainer calls them. `model::tests` compares what they do with the trainer of
//! the crate.

use std::ffi::{CString, c_char};
use std::ptr;

use super::*;
use crate::model::config::*;
use crate::model::state::*;
use crate::model::*;

/// A small network.
pub(in crate::tests) fn config(real: DType) -> pixmim_model_config {
    let mut config = pixmim_model_config {
        struct_size: size_of::<pixmim_model_config>() as u32,
        dtype: 0,
        image_size: 0,
        patch_size: 0,
        dim: 0,
        depth: 0,
        heads: 0,
        decoder_dim: 0,
        decoder_depth: 0,
        decoder_heads: 0,
        mlp_ratio: 0,
        micro_batch: 0,
        mask_block: 0,
        seed: 0,
        mask_ratio: 0.0,
        radius: 0.0,
        mean: [0.0; 3],
        std: [0.0; 3],
        betas: [0.0; 2],
        eps: 0.0,
        weight_decay: 0.0,
        clip: 0.0,
        norm_pix: 0,
        decay_tokens: 0,
        record: 0,
        reserved: 0,
    };
    // SAFETY: a text that ends, and a config of ours.
    let status = unsafe { pixmim_model_config_preset(c"demo".as_ptr(), &raw mut config) };
    assert_eq!(status, PIXMIM_OK, "{}", last_error());
    pixmim_model_config {
        dtype: real as i32,
        image_size: SIDE as i64,
        patch_size: P as i64,
        dim: D as i64,
        depth: 1,
        heads: NH as i64,
        decoder_dim: D as i64,
        decoder_depth: 1,
        decoder_heads: NH as i64,
        mlp_ratio: 2,
        micro_batch: B as i64,
        mask_ratio: 0.55,
        radius: RADIUS,
        ..config
    }
}

/// The model of a lab, and its weights in a file where it can write them.
pub(in crate::tests) fn model(
    context: &pixmim_context,
    real: DType,
    path: &CString,
) -> *mut pixmim_model {
    let (config, mut model) = (config(real), ptr::null_mut());
    // SAFETY: a context, a config and a place of ours.
    let status = unsafe { pixmim_model_create(context, &raw const config, &raw mut model) };
    assert_eq!(status, PIXMIM_OK, "{}", last_error());
    if real != DType::F64 {
        // SAFETY: the model is alive, the path ends.
        let status = unsafe { pixmim_model_save(model, path.as_ptr(), ptr::null_mut()) };
        assert_eq!(status, PIXMIM_OK, "{}", last_error());
    }
    model
}

fn config_words(real: DType) -> Arg {
    let words = size_of::<pixmim_model_config>() / 8;
    let config = config(real);
    // SAFETY: the config has so many words, each part of it initialised: its fields leave no gaps.
    let words = unsafe { std::slice::from_raw_parts((&raw const config).cast::<u64>(), words) };
    Arg::Block(words.into())
}

fn text(text: &CString) -> Arg {
    let mut words = vec![0u64; text.as_bytes_with_nul().len().div_ceil(8)];
    for (i, &byte) in text.as_bytes().iter().enumerate() {
        words[i / 8] |= u64::from(byte) << (8 * (i % 8));
    }
    Arg::Block(words.into())
}

pub(super) fn models(lab: &Lab) -> Vec<Case> {
    let model = || Arg::Word(Raw::address(lab.model));
    let path = || text(&lab.weights);
    let wide = lab.real.wide();
    let pred = lab.real;
    let mut cases = vec![
        case!(pixmim_model_config_preset {
            name: text(&c"tiny".into()),
            config: config_words(lab.real)
        }),
        case!(pixmim_model_create {
            context: context(lab),
            config: config_words(lab.real),
            out: place(8),
        }),
        case!(pixmim_model_clear { model: model(), stream: stream() }),
        case!(pixmim_model_forward_loss {
            model: model(),
            images: lab.inp(DType::U8, &[IMAGE_BYTES]),
            geometry: lab.holding(DType::I64, &[B, 6], &GEOMETRY),
            samples: lab.holding(DType::I64, &[B], &[5, 1, 1 << 40]),
            epoch: lab.holding(DType::I64, &[1], &[3]),
            micro_batches: int(1),
            stream: stream(),
        }),
        case!(pixmim_model_output_info {
            model: model(),
            which: int(i64::from(PIXMIM_PRED)),
            like: place(size_of::<pixmim_tensor>()),
            stream: stream(),
        }),
        case!(pixmim_model_output_get {
            model: model(),
            which: int(i64::from(PIXMIM_PRED)),
            out: lab.out(pred, &[B, M, E]),
            stream: stream(),
        }),
        case!(pixmim_model_backward { model: model(), stream: stream() }),
        case!(pixmim_model_step { model: model(), lr: number(1e-3), stream: stream() }),
        case!(pixmim_model_step_with {
            model: model(),
            lr: lab.inp(DType::F64, &[1]),
            stream: stream(),
        }),
        case!(pixmim_model_outcome {
            model: model(),
            loss: place(8),
            grad_norm: place(8),
            updated: place(4),
            stream: stream(),
        }),
        case!(pixmim_model_state_count { model: model(), count: place(8) }),
        case!(pixmim_model_state_info {
            model: model(),
            index: int(0),
            name: place(size_of::<*const c_char>()),
            like: place(size_of::<pixmim_tensor>()),
        }),
        case!(pixmim_model_state_get {
            model: model(),
            kind: int(i64::from(PIXMIM_GRAD)),
            index: int(0),
            out: lab.out(wide, &lab.first_weight),
            stream: stream(),
        }),
        case!(pixmim_model_state_set {
            model: model(),
            kind: int(i64::from(PIXMIM_GRAD)),
            index: int(0),
            inp: lab.inp(wide, &lab.first_weight),
            stream: stream(),
        }),
        case!(pixmim_model_grads { model: model(), out: place(size_of::<pixmim_tensor>()) }),
        case!(pixmim_model_updates_get { model: model(), updates: place(8), stream: stream() }),
        case!(pixmim_model_updates_set { model: model(), updates: int(7), stream: stream() }),
    ];
    if lab.real != DType::F64 {
        cases.extend([
            case!(pixmim_model_save { model: model(), path: path(), stream: stream() }),
            case!(pixmim_model_config_load { path: path(), config: config_words(lab.real) }),
            case!(pixmim_model_load {
                context: context(lab),
                path: path(),
                config: config_words(lab.real),
                out: place(8),
            }),
        ]);
    }
    cases
}
