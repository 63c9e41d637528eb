//! Each op by itself, at the shapes it has in the two steps of `examples/step_speed`.
//!
//! `cargo bench --bench ops -- layer_norm` picks one. Inputs are random. A rate in bytes counts what an op must read
//! and write once; a rate in elements counts floating-point operations, two for a multiplication and its addition.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on stops")]

mod adamw;
mod add_positions;
mod attention;
mod cast;
mod gather_tokens;
mod gelu;
mod grad_norm;
mod input;
mod layer_norm;
mod linear;
mod low_freq_target;
mod masked_mse_loss;
mod patch_embed;
mod random_masking;
mod restore_tokens;

#[expect(dead_code, reason = "whole steps are timed by benches/train_step.rs")]
#[path = "../../examples/step_speed/workload.rs"]
mod workload;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use pixmim::rng::{Purpose, Stream};
use pixmim::{Cpu, DType, Device, Products, Tensor};
use workload::{SMALL64, VIT_B, Workload};

const WORKLOADS: [Workload; 2] = [SMALL64, VIT_B];
/// The precisions of matrix products, with their names.
const PRODUCTS: [(&str, Device); 2] = [
    ("f32", Device::Cpu(Cpu { products: Products::F32 })),
    ("bf16", Device::Cpu(Cpu { products: Products::Bf16 })),
];

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let ops: [fn(&mut Criterion); 15] = [
        random_masking::bench,
        input::bench,
        low_freq_target::bench,
        patch_embed::bench,
        layer_norm::bench,
        linear::bench,
        gelu::bench,
        attention::bench,
        add_positions::bench,
        restore_tokens::bench,
        gather_tokens::bench,
        masked_mse_loss::bench,
        grad_norm::bench,
        adamw::bench,
        cast::bench,
    ];
    for bench in ops {
        bench(&mut criterion);
    }
    criterion.final_summary();
}

/// Times `run` as `op/what/shape`.
fn time(
    criterion: &mut Criterion,
    op: &str,
    what: &str,
    shape: &str,
    work: Throughput,
    mut run: impl FnMut() -> pixmim::Result<()>,
) {
    let mut group = criterion.benchmark_group(op);
    group.throughput(work);
    group.bench_function(BenchmarkId::new(what, shape), |b| b.iter(|| run().unwrap()));
    group.finish();
}

/// Bytes of one pass over each tensor.
fn bytes(tensors: &[&Tensor]) -> Throughput {
    let sizes = tensors.iter().map(|t| t.view().elems() * t.view().dtype().size_bytes());
    Throughput::Bytes(sizes.sum::<usize>() as u64)
}

/// Operations of products of `rows x inner` with `inner x cols`, `times` of them.
fn flops(times: usize, rows: usize, inner: usize, cols: usize) -> Throughput {
    Throughput::Elements((2 * times * rows * inner * cols) as u64)
}

/// A tensor of zeros: for outputs and workspaces.
fn zeros(dtype: DType, shape: &[usize]) -> Tensor {
    Tensor::new(&Device::cpu(), dtype, shape).unwrap()
}

/// An f32 tensor uniform on [-1, 1), each call another one.
fn random(shape: &[usize]) -> Tensor {
    static SEED: AtomicU64 = AtomicU64::new(0);
    let mut tensor = zeros(DType::F32, shape);
    let noise = Stream::new(SEED.fetch_add(1, Ordering::Relaxed), 0, 0, Purpose::Init);
    let values = tensor.view_mut().into_slice::<f32>().iter_mut().zip(0..);
    values.for_each(|(x, i)| *x = noise.word(i) as i32 as f32 / (1u64 << 31) as f32);
    tensor
}

/// Which patches of each image are kept and masked, as a step draws them.
struct Masks {
    ids_keep: Tensor,
    ids_masked: Tensor,
    ids_restore: Tensor,
}

impl Masks {
    fn new(workload: &Workload) -> Self {
        let mut masks = Self::zeros(workload);
        random_masking::draw(workload, &mut masks, &mut random_masking::workspace(workload))
            .unwrap();
        masks
    }

    fn zeros(workload: &Workload) -> Self {
        let (images, patches) = (workload.images, workload.config.patches());
        Self {
            ids_keep: zeros(DType::I32, &[images, workload.kept()]),
            ids_masked: zeros(DType::I32, &[images, patches - workload.kept()]),
            ids_restore: zeros(DType::I32, &[images, patches]),
        }
    }
}
