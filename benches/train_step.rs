//! The whole training step, as `examples/step_speed` and `scripts/compare-cpu` time it: images in a second.
//!
//! `PIXMIM_BENCH_DEVICE=cuda` times it on a GPU, with as many of 1024 images as fit; `simt` runs a tiny one on the host
//! executor.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on stops")]

#[expect(dead_code, reason = "names are for the other benches")]
#[path = "../examples/step_speed/workload.rs"]
mod workload;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use pixmim::Device;
use workload::{Images, Precision, SMALL64, TINY, VIT_B};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(10))
        .configure_from_args();
    let name = std::env::var("PIXMIM_BENCH_DEVICE").unwrap_or_else(|_| "cpu".into());
    let dev = workload::device(&name).unwrap();
    let workloads = match name.as_str() {
        "simt" => &[TINY][..],
        "cpu" => &[SMALL64, VIT_B],
        _ => &[VIT_B],
    };
    let mut group = criterion.benchmark_group("train_step");
    for &workload in workloads {
        for (name, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
            let (dev, dtype) = precision.on(&dev);
            // Made at the first use, as a step may be filtered out; criterion calls the closure for every sample.
            let (mut workload, mut run) = (workload, None);
            if let Device::Cuda(_) = dev {
                let most = if workload.name == TINY.name { TINY.images } else { 1024 };
                let trainer;
                (workload, trainer) = workload.fitting(most, &dev, dtype).unwrap();
                run = Some((trainer, Images::new(&workload)));
            }
            group.throughput(Throughput::Elements(workload.images as u64));
            group.bench_function(BenchmarkId::new(workload.name, name), |b| {
                let (trainer, images) = run.get_or_insert_with(|| {
                    (workload.trainer(&dev, dtype).unwrap(), Images::new(&workload))
                });
                b.iter(|| workload::step(trainer, images, 1, 0).unwrap());
            });
        }
    }
    group.finish();
    criterion.final_summary();
}
