//! What the other rates are measured against: a copy, and a product of large square matrices, in the same run.

use pixmim::ops::linear::{self, Epilogue, Forward};
use pixmim::{DType, Device};

use crate::{Bench, PRECISIONS, bytes, products};

pub(crate) fn bench(bench: &mut Bench) {
    let dev = bench.dev.clone();
    let is_tiny = bench.workloads[0].images < 8;
    let [mib, side] = match dev {
        Device::Cuda(_) if !is_tiny => [2048, 8192],
        Device::Cuda(_) => [1, 64],
        _ => [256, 2048],
    };
    let inp = bench.random(DType::U8, &[mib << 20]);
    let mut out = bench.zeros(DType::U8, &[mib << 20]);
    let work = bytes(&[&inp, &out]);
    bench.time("ceiling", "copy", &format!("{mib} MiB"), work, || {
        dev.copy(out.view_mut(), inp.view())
    });
    for (name, precision) in PRECISIONS {
        let (dev, dtype) = precision.on(&bench.dev);
        let square = [side, side];
        let (inp, weight) = (bench.random(dtype, &square), bench.random(dtype, &square));
        let bias = bench.zeros(dtype, &[side]);
        let mut out = bench.zeros(dtype, &square);
        let work = products(1, [side; 3], &[&inp, &weight, &out]);
        bench.time("ceiling", &format!("product {name}"), &side.to_string(), work, || {
            linear::forward(
                &dev,
                Forward {
                    out: out.view_mut(),
                    inp: inp.view(),
                    weight: weight.view(),
                    bias: bias.view(),
                    epilogue: Epilogue::None,
                },
            )
        });
    }
}
