//! Drawing the masks of a batch.

use pixmim::ops::cost;

use super::has_own_decoder;
use crate::inputs::Masks;
use crate::{Bench, Case};

pub(crate) fn bench(bench: &mut Bench) {
    for w in bench.moved().into_iter().filter(has_own_decoder) {
        let case = Case {
            op: "random_masking",
            direction: "forward",
            shape: w.name,
            batch: w.images,
            precision: None,
            cost: cost::random_masking_forward([w.images, w.config.patches()]),
        };
        bench.time(case, |on| {
            let mut masks = Masks::drawn(on, &w);
            move |dev| masks.draw(dev)
        });
    }
}
