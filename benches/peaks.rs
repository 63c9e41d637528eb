//! What the rows are measured against: a copy, and a product of large square matrices in each precision, in the same
//! run.

use std::time::Duration;

use pixmim::ops::cost::{self, Cost, Peaks};
use pixmim::ops::linear::{self, Epilogue, Forward};
use pixmim::{DType, Device, Result};
use rayon::prelude::*;

use crate::inputs::Inputs;
use crate::report::Row;
use crate::{PRECISIONS, elapsed, name};

/// The roofs of a device.
pub(crate) struct Measured {
    /// As they stand in the record: the copy, and the product in each precision.
    pub(crate) rows: Vec<Row>,
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
        let row = |direction: &str, shape, precision, cost, took| Row {
            op: "peak".into(),
            direction: direction.into(),
            shape,
            batch: 1,
            precision,
            took,
            images_per_second: None,
            cost: Some(cost),
        };
        let work = cost::cast_forward([DType::U8; 2], copied_bytes);
        let mib = format!("{} MiB", copied_bytes >> 20);
        let mut rows = vec![row("copy", mib, "u8", work, copy(&on, copied_bytes))];
        for precision in PRECISIONS {
            let (dev, dtype) = precision.on(dev);
            let work = cost::linear_forward(dtype, [side; 3], false);
            let took = product(&Inputs { dev: &dev, dtype, noise }, side);
            rows.push(row("product", side.to_string(), name(precision), work, took));
        }
        Self { rows }
    }

    /// The roofs of work whose products are in this precision; of work that has none, those of f32.
    pub(crate) fn of(&self, precision: &str) -> Peaks {
        let per_second = |row: &Row, amount: fn(Cost) -> u64| {
            amount(row.cost.expect("given above")) as f64 / row.took.as_secs_f64()
        };
        let [copy, f32, bf16] = &self.rows[..] else { unreachable!("a copy and two products") };
        let product = if precision == bf16.precision { bf16 } else { f32 };
        Peaks {
            bytes_per_second: per_second(copy, |cost| cost.bytes),
            flops_per_second: per_second(product, |cost| cost.flops),
        }
    }
}

fn copy(on: &Inputs<'_>, bytes: usize) -> Duration {
    if let Device::Cuda(_) = on.dev {
        let inp = on.random(DType::U8, &[bytes]);
        let mut out = on.zeros(DType::U8, &[bytes]);
        return fastest(on.dev, || on.dev.copy(out.view_mut(), inp.view()));
    }
    // By all threads: one does not saturate the memory.
    const PART: usize = 1 << 20;
    let (inp, mut out) = (vec![1u8; bytes], vec![0u8; bytes]);
    fastest(on.dev, || {
        let parts = out.par_chunks_mut(PART).zip(inp.par_chunks(PART));
        parts.for_each(|(out, inp)| out.copy_from_slice(inp));
        Ok(())
    })
}

fn product(on: &Inputs<'_>, side: usize) -> Duration {
    let (dtype, square) = (on.dtype, [side, side]);
    let (inp, weight) = (on.random(dtype, &square), on.random(dtype, &square));
    let (bias, mut out) = (on.zeros(dtype, &[side]), on.zeros(dtype, &square));
    fastest(on.dev, || {
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
    })
}

/// The fastest of ten runs, after three that do not count: a peak.
fn fastest(dev: &Device, mut run: impl FnMut() -> Result<()>) -> Duration {
    let times = (0..13).map(|_| elapsed(dev, 1, &mut run).unwrap());
    times.skip(3).min().expect("ten of them")
}
