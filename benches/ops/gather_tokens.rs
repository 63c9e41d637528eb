//! The masked patches' tokens at the decoder's end.

use pixmim::ops::gather_tokens::{self, Backward, Forward};

use crate::{Bench, Masks, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    for w in bench.workloads.clone() {
        let (images, dim, patches) = (w.images, w.config.decoder_dim, w.config.patches());
        let masks = Masks::new(bench, &w);
        let inp = bench.random(dtype, &[images, 1 + patches, dim]);
        let mut out = bench.zeros(dtype, &[images, patches - w.kept(), dim]);
        let work = bytes(&[&out, &out]);
        bench.time("gather_tokens", "forward", w.name, work, || {
            gather_tokens::forward(
                &dev,
                Forward {
                    out: out.view_mut(),
                    inp: inp.view(),
                    ids_masked: masks.ids_masked.view(),
                },
            )
        });
        let grad_out = bench.random(dtype, &[images, patches - w.kept(), dim]);
        let mut grad_inp = bench.zeros(dtype, &[images, 1 + patches, dim]);
        let work = bytes(&[&grad_out, &grad_inp]);
        bench.time("gather_tokens", "backward", w.name, work, || {
            gather_tokens::backward(
                &dev,
                Backward {
                    grad_inp: grad_inp.view_mut(),
                    grad_out: grad_out.view(),
                    ids_restore: masks.ids_restore.view(),
                },
            )
        });
    }
}
