//! The masked patches' tokens at the decoder's end.

use criterion::Criterion;
use pixmim::ops::gather_tokens::{self, Backward, Forward};
use pixmim::{DType, Device};

use crate::{Masks, WORKLOADS, bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    let dev = Device::cpu();
    for w in WORKLOADS {
        let (images, dim, patches) = (w.images, w.config.decoder_dim, w.config.patches());
        let masks = Masks::new(&w);
        let inp = random(&[images, 1 + patches, dim]);
        let mut out = zeros(DType::F32, &[images, patches - w.kept(), dim]);
        let work = bytes(&[&out, &out]);
        time(criterion, "gather_tokens", "forward", w.name, work, || {
            gather_tokens::forward(
                &dev,
                Forward {
                    out: out.view_mut(),
                    inp: inp.view(),
                    ids_masked: masks.ids_masked.view(),
                },
            )
        });
        let grad_out = random(&[images, patches - w.kept(), dim]);
        let mut grad_inp = zeros(DType::F32, &[images, 1 + patches, dim]);
        let work = bytes(&[&grad_out, &grad_inp]);
        time(criterion, "gather_tokens", "backward", w.name, work, || {
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
