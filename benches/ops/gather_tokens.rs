//! The masked patches' tokens at the decoder's end.

use pixmim::ops::cost;
use pixmim::ops::gather_tokens::{self, Backward, Forward};

use super::has_own_decoder;
use crate::inputs::Masks;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    let dtype = bench.dtype(bench.precision);
    for w in bench.moved().into_iter().filter(has_own_decoder) {
        let (batch, dim, patches) = (w.images, w.config.decoder_dim, w.config.patches());
        let masked = patches - w.kept();
        let case = Case {
            op: "gather_tokens",
            direction: "forward",
            shape: w.name,
            batch,
            precision: None,
            cost: cost::gather_tokens_forward(dtype, [batch, masked, dim]),
        };
        bench.time(case, |on| {
            let masks = Masks::drawn(on, &w);
            let inp = on.random(dtype, &[batch, 1 + patches, dim]);
            let mut out = on.zeros(dtype, &[batch, masked, dim]);
            move |dev| {
                gather_tokens::forward(
                    dev,
                    Forward {
                        out: out.view_mut(),
                        inp: inp.view(),
                        ids_masked: masks.ids_masked.view(),
                    },
                )
            }
        });
        let case = Case {
            op: "gather_tokens",
            direction: "backward",
            shape: w.name,
            batch,
            precision: None,
            cost: cost::gather_tokens_backward(dtype, [batch, patches, masked, dim]),
        };
        bench.time(case, |on| {
            let masks = Masks::drawn(on, &w);
            let grad_out = on.random(dtype, &[batch, masked, dim]);
            let mut grad_inp = on.zeros(dtype, &[batch, 1 + patches, dim]);
            move |dev| {
                gather_tokens::backward(
                    dev,
                    Backward {
                        grad_inp: grad_inp.view_mut(),
                        grad_out: grad_out.view(),
                        ids_restore: masks.ids_restore.view(),
                    },
                )
            }
        });
    }
}
