//! The decoder's tokens, put together from kept and masked rows: at its width, and at that of queries, keys, values.

use pixmim::ops::restore_tokens::{self, Backward, Forward};

use crate::{Bench, Masks, bytes};

pub(crate) fn bench(bench: &mut Bench) {
    let (dev, dtype) = (bench.dev.clone(), bench.dtype);
    for w in bench.workloads.clone() {
        let masks = Masks::new(bench, &w);
        let (images, patches) = (w.images, w.config.patches());
        let width = w.config.decoder_dim;
        for (stem, width) in [("tokens", width), ("qkv", 3 * width)] {
            let shape = format!("{stem}/{}", w.name);
            let inp = bench.random(dtype, &[images, 1 + w.kept(), width]);
            let fill = bench.random(dtype, &[patches, width]);
            let mut out = bench.zeros(dtype, &[images, 1 + patches, width]);
            let work = bytes(&[&inp, &fill, &out]);
            bench.time("restore_tokens", "forward", &shape, work, || {
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
            let grad_out = bench.random(dtype, &[images, 1 + patches, width]);
            let mut grad_inp = bench.zeros(dtype, &[images, 1 + w.kept(), width]);
            let mut grad_fill = bench.zeros(dtype, &[patches, width]);
            let work = bytes(&[&grad_out, &grad_inp, &grad_fill]);
            bench.time("restore_tokens", "backward", &shape, work, || {
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
