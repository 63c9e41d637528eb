//! The decoder's tokens, put together from kept and masked rows: at its width, and at that of queries, keys, values.

use pixmim::ops::cost;
use pixmim::ops::restore_tokens::{self, Backward, Forward};

use super::has_own_decoder;
use crate::inputs::Masks;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    for w in bench.moved().into_iter().filter(has_own_decoder) {
        let (batch, kept, patches) = (w.images, w.kept(), w.config.patches());
        for (what, width) in [("tokens", w.config.decoder_dim), ("qkv", 3 * w.config.decoder_dim)] {
            let shape = &format!("{} {what}", w.name);
            let case = Case {
                op: "restore_tokens",
                direction: "forward",
                shape,
                batch,
                precision: None,
                cost: cost::restore_tokens_forward(dtype, [batch, patches, kept, width]),
            };
            bench.time(case, |on| {
                let masks = Masks::drawn(on, &w);
                let inp = on.random(dtype, &[batch, 1 + kept, width]);
                let fill = on.random(dtype, &[patches, width]);
                let mut out = on.zeros(dtype, &[batch, 1 + patches, width]);
                move |dev| {
                    restore_tokens::forward(
                        dev,
                        Forward {
                            out: out.view_mut(),
                            inp: inp.view(),
                            fill: fill.view(),
                            ids_restore: masks.ids_restore.view(),
                        },
                    )
                }
            });
            let case = Case {
                op: "restore_tokens",
                direction: "backward",
                shape,
                batch,
                precision: None,
                cost: cost::restore_tokens_backward(dtype, [batch, patches, kept, width]),
            };
            bench.time(case, |on| {
                let masks = Masks::drawn(on, &w);
                let grad_out = on.random(dtype, &[batch, 1 + patches, width]);
                let mut grad_inp = on.zeros(dtype, &[batch, 1 + kept, width]);
                let mut grad_fill = on.zeros(dtype, &[patches, width]);
                move |dev| {
                    restore_tokens::backward(
                        dev,
                        Backward {
                            grad_inp: grad_inp.view_mut(),
                            grad_fill: grad_fill.view_mut(),
                            grad_out: grad_out.view(),
                            ids_restore: masks.ids_restore.view(),
                        },
                    )
                }
            });
        }
    }
}
