//! The decoder's tokens, put together from kept and masked rows: at its width, and at that of queries, keys, values.

use criterion::Criterion;
use pixmim::ops::restore_tokens::{self, Backward, Forward};
use pixmim::{DType, Device};

use crate::{Masks, WORKLOADS, bytes, random, time, zeros};

pub(crate) fn bench(criterion: &mut Criterion) {
    let dev = Device::cpu();
    for w in WORKLOADS {
        let masks = Masks::new(&w);
        let (images, patches) = (w.images, w.config.patches());
        let width = w.config.decoder_dim;
        for (stem, width) in [("tokens", width), ("qkv", 3 * width)] {
            let shape = format!("{stem}/{}", w.name);
            let inp = random(&[images, 1 + w.kept(), width]);
            let fill = random(&[patches, width]);
            let mut out = zeros(DType::F32, &[images, 1 + patches, width]);
            let work = bytes(&[&inp, &fill, &out]);
            time(criterion, "restore_tokens", "forward", &shape, work, || {
                restore_tokens::forward(
                    &dev,
                    Forward {
                        out: out.view_mut(),
                        inp: inp.view(),
                        fill: fill.view(),
                        ids_restore: masks.ids_restore.view(),
                    },
                )
            });
            let grad_out = random(&[images, 1 + patches, width]);
            let mut grad_inp = zeros(DType::F32, &[images, 1 + w.kept(), width]);
            let mut grad_fill = zeros(DType::F32, &[patches, width]);
            let work = bytes(&[&grad_out, &grad_inp, &grad_fill]);
            time(criterion, "restore_tokens", "backward", &shape, work, || {
                restore_tokens::backward(
                    &dev,
                    Backward {
                        grad_inp: grad_inp.view_mut(),
                        grad_fill: grad_fill.view_mut(),
                        grad_out: grad_out.view(),
                        ids_restore: masks.ids_restore.view(),
                    },
                )
            });
        }
    }
}
