//! What the rows are measured against: a copy, and a product of large square matrices in each precision, in the same run.

use std::time::Duration;

use pixmim::ops::cost::{self, Cost, Peaks};
use pixmim::ops::linear::{self, Epilogue, Forward};
use pixmim::{DType, Device, Result};
use rayon::prelude::*;

use crate::inputs::Inputs;
use crate::workload::Precision;
use crate::{PRECISIONS, elapsed};

/// The roofs of a device.
pub(crate) struct Measured {
    /// Bytes of each of the two tensors of the copy.
    pub(crate) copied_bytes: usize,
    pub(crate) bytes_per_second: f64,
    /// Side of the matrices.
    pub(crate) side: usize,
    pub(crate) flops_per_second: [(Precision, f64); 2],
}

impl Measured {
    /// Measures; `small` only to see that it can be done.
    pub(crate) fn new(dev: &Device, noise: &[f32], small: bool) -> Self {
        let (copied_bytes, side) = match dev {
            _ if small => (1 << 20, 64),
            Device::Cuda(_) => (2 << 30, 8192),
            _ => (256 << 20, 2048),
        };
        let on = Inputs { dev, dtype: DType::F32, noise };
        let bytes_per_second = 2.0 * copied_bytes as f64 / copy(&on, copied_bytes).as_secs_f64();
        let flops_per_second = PRECISIONS.map(|precision| {
            let (dev, dtype) = precision.on(dev);
            let (took, work) = product(&Inputs { dev: &dev, dtype, noise }, side);
            (precision, work.flops as f64 / took.as_secs_f64())
        });
        Self { copied_bytes, bytes_per_second, side, flops_per_second }
    }

    /// The roofs of work whose products are in this precision.
    pub(crate) fn of(&self, precision: Precision) -> Peaks {
        let found = self.flops_per_second.iter().find(|(known, _)| *known == precision);
        let (_, flops_per_second) = *found.expect("there is no other precision");
        Peaks { bytes_per_second: self.bytes_per_second, flops_per_second }
    }
}

fn copy(on: &Inputs<'_>, bytes: usize) -> Duration {
    if let Device::Cuda(_) = on.dev {
        let inp = on.random(DType::U8, &[bytes]);
        let mut out = on.zeros(DType::U8, &[bytes]);
        return median(on.dev, || on.dev.copy(out.view_mut(), inp.view()));
    }
    // By all threads: one does not saturate the memory.
    const PART: usize = 1 << 20;
    let (inp, mut out) = (vec![1u8; bytes], vec![0u8; bytes]);
    median(on.dev, || {
        let parts = out.par_chunks_mut(PART).zip(inp.par_chunks(PART));
        parts.for_each(|(out, inp)| out.copy_from_slice(inp));
        Ok(())
    })
}

fn product(on: &Inputs<'_>, side: usize) -> (Duration, Cost) {
    let (dtype, square) = (on.dtype, [side, side]);
    let (inp, weight) = (on.random(dtype, &square), on.random(dtype, &square));
    let (bias, mut out) = (on.zeros(dtype, &[side]), on.zeros(dtype, &square));
    let took = median(on.dev, || {
        linear::forward(
            on.dev,
            Forward {
                out: out.view_mut(),
                inp: inp.view(),
                weight: weight.view(),
                bias: bias.view(),
                epilogue: Epilogue::None,
            },
        )
    });
    (took, cost::linear_forward(dtype, [side; 3], false))
}

/// Median of ten runs, after three that do not count.
fn median(dev: &Device, mut run: impl FnMut() -> Result<()>) -> Duration {
    let mut times: Vec<_> = (0..13).map(|_| elapsed(dev, 1, &mut run).unwrap()).skip(3).collect();
    times.sort();
    times[times.len() / 2]
}
