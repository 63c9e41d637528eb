//! The whole training step, as `examples/step_speed` and `scripts/compare-cpu` time it: images in a second.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on stops")]

#[path = "../examples/step_speed/workload.rs"]
mod workload;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use pixmim::Products;
use workload::{Images, SMALL64, VIT_B};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(10))
        .configure_from_args();
    let mut group = criterion.benchmark_group("train_step");
    for workload in [SMALL64, VIT_B] {
        group.throughput(Throughput::Elements(workload.images as u64));
        for (name, products) in [("f32", Products::F32), ("bf16", Products::Bf16)] {
            // Made at the first use, as a step may be filtered out; criterion calls the closure for every sample.
            let mut run = None;
            group.bench_function(BenchmarkId::new(workload.name, name), |b| {
                let (trainer, images) = run.get_or_insert_with(|| {
                    (workload.trainer(products).unwrap(), Images::new(&workload))
                });
                b.iter(|| workload::step(trainer, images, 0).unwrap());
            });
        }
    }
    group.finish();
    criterion.final_summary();
}
