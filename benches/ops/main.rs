//! Each op by itself, at the shapes it has in the steps of `examples/step_speed`.
//!
//! `cargo bench --bench ops -- layer_norm` picks one. Inputs are random. A rate in bytes counts what an op must read
//! and write once; a rate in elements counts floating-point operations, two for a multiplication and its addition.
//!
//! `PIXMIM_BENCH_DEVICE=cuda` runs the same on a GPU, in bf16, products in f32 too, with ViT-B at 1024 images. A sample
//! there is the time of many launches enqueued one after another, from one wait for the GPU to the next, so it leaves out
//! what a launch costs the CPU. The tensors of an op together are larger than any L2 cache, those of `random_masking` and
//! of an op's parameters aside. `simt` runs them on the host executor, once and tiny, to see that they run at all.
//! `ceiling` is what the rates are measured against: see `scripts/bench-table`.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on stops")]

mod adamw;
mod add_positions;
mod attention;
mod cast;
mod ceiling;
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

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;
use pixmim::dtype::Element;
use pixmim::model::params::Table;
use pixmim::rng::{Purpose, Stream};
use pixmim::{DType, Device, Tensor};
use workload::{Precision, SMALL64, TINY, VIT_B, Workload};

/// The precisions of matrix products, with their names.
const PRECISIONS: [(&str, Precision); 2] = [("f32", Precision::F32), ("bf16", Precision::Bf16)];

fn main() {
    let mut bench = Bench::new();
    let ops: [fn(&mut Bench); 16] = [
        ceiling::bench,
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
    for op in ops {
        op(&mut bench);
    }
    bench.criterion.final_summary();
}

/// Where ops are timed, and at which sizes.
struct Bench {
    criterion: Criterion,
    dev: Device,
    /// Of activations, in ops that know no other precision.
    dtype: DType,
    workloads: Vec<Workload>,
    /// Random numbers on [-1, 1).
    noise: Vec<f32>,
}

impl Bench {
    fn new() -> Self {
        let name = std::env::var("PIXMIM_BENCH_DEVICE").unwrap_or_else(|_| "cpu".into());
        let dev = workload::device(&name).unwrap();
        let workloads = match name.as_str() {
            "simt" => vec![TINY],
            "cpu" => vec![SMALL64, VIT_B],
            _ => vec![Workload { images: 1024, ..VIT_B }],
        };
        let is_gpu = matches!(dev, Device::Cuda(_));
        let [samples, warm_up_ms, ms] = if is_gpu { [10, 200, 500] } else { [20, 500, 2000] };
        let criterion = Criterion::default()
            .sample_size(samples as usize)
            .warm_up_time(Duration::from_millis(warm_up_ms))
            .measurement_time(Duration::from_millis(ms))
            .configure_from_args();
        let noise = Stream::new(0, 0, 0, Purpose::Init);
        let unit = |word: u32| word as i32 as f32 / (1u64 << 31) as f32;
        let noise = (0..1 << 20).map(|i| unit(noise.word(i))).collect();
        let dtype = if is_gpu { DType::Bf16 } else { DType::F32 };
        Self { criterion, dev, dtype, workloads, noise }
    }

    /// Times `run` as `op/what/shape`.
    fn time(
        &mut self,
        op: &str,
        what: &str,
        shape: &str,
        work: Throughput,
        mut run: impl FnMut() -> pixmim::Result<()>,
    ) {
        let dev = &self.dev;
        let wait = || {
            if let Device::Cuda(gpu) = dev {
                gpu.synchronize().unwrap();
            }
        };
        let mut group = self.criterion.benchmark_group(op);
        group.throughput(work);
        group.bench_function(BenchmarkId::new(what, shape), |b| {
            b.iter_custom(|times| {
                wait();
                let start = Instant::now();
                (0..times).for_each(|_| run().unwrap());
                wait();
                start.elapsed()
            });
        });
        group.finish();
    }

    /// A tensor of zeros: for outputs and workspaces.
    fn zeros(&self, dtype: DType, shape: &[usize]) -> Tensor {
        let mut tensor = Tensor::new(&self.dev, dtype, shape).unwrap();
        self.dev.clear(tensor.view_mut()).unwrap();
        tensor
    }

    /// A workspace of this many bytes.
    fn workspace(&self, bytes: usize) -> Tensor {
        self.zeros(DType::U8, &[bytes])
    }

    fn holding<T: Element>(&self, values: &[T], shape: &[usize]) -> Tensor {
        Tensor::holding(&self.dev, values, shape).unwrap()
    }

    /// A tensor of f32, bf16 or u8 with random values, every million of them the same.
    fn random(&self, dtype: DType, shape: &[usize]) -> Tensor {
        match dtype {
            DType::Bf16 => self.repeat(shape, bf16::from_f32),
            DType::U8 => self.repeat(shape, |x| (128.0 + 128.0 * x) as u8),
            _ => self.repeat(shape, |x| x),
        }
    }

    fn repeat<T: Element>(&self, shape: &[usize], round: impl Fn(f32) -> T) -> Tensor {
        let noise: Vec<T> = self.noise.iter().map(|&x| round(x)).collect();
        let mut tensor = Tensor::new(&self.dev, T::DTYPE, shape).unwrap();
        let elems = tensor.view().elems();
        let mut rest = tensor.view_mut().reshaped(&[elems]).unwrap();
        while rest.elems() > 0 {
            let count = rest.elems().min(noise.len());
            let (part, others) = rest.split_at(count);
            self.dev.upload(part, &noise[..count]).unwrap();
            rest = others;
        }
        tensor
    }

    /// Lengths of vectors of parameters. On the CPU those of the small network and of a block of ViT-B's encoder (four layers
    /// and two layer norms), as all 112 million of ViT-B, with moments and gradients, would take 1.8 GB.
    fn parameters(&self) -> Vec<(&'static str, usize)> {
        let of = |w: &Workload| (w.name, Table::new(&w.config).parameters());
        match self.dev {
            Device::Cuda(_) => self.workloads.iter().map(of).collect(),
            _ => {
                let dim = VIT_B.config.dim;
                vec![of(&SMALL64), ("vit_b block", 12 * dim * dim + 13 * dim)]
            }
        }
    }
}

/// Bytes of one pass over each tensor.
fn bytes(tensors: &[&Tensor]) -> Throughput {
    Throughput::Bytes(tensors.iter().map(|t| t.view().bytes()).sum::<usize>() as u64)
}

/// Operations of products of `rows x inner` with `inner x cols`, `times` of them, and one pass over each tensor.
fn products(times: usize, [rows, inner, cols]: [usize; 3], tensors: &[&Tensor]) -> Throughput {
    let elements = (2 * times * rows * inner * cols) as u64;
    let bytes = tensors.iter().map(|t| t.view().bytes()).sum::<usize>() as u64;
    Throughput::ElementsAndBytes { elements, bytes }
}

/// Which patches of each image are kept and masked, as a step draws them.
struct Masks {
    ids_keep: Tensor,
    ids_masked: Tensor,
    ids_restore: Tensor,
}

impl Masks {
    fn new(bench: &Bench, workload: &Workload) -> Self {
        let mut masks = Self::zeros(bench, workload);
        let mut draw = random_masking::Draw::new(bench, workload);
        draw.draw(&bench.dev, &mut masks).unwrap();
        masks
    }

    fn zeros(bench: &Bench, workload: &Workload) -> Self {
        let (images, patches) = (workload.images, workload.config.patches());
        Self {
            ids_keep: bench.zeros(DType::I32, &[images, workload.kept()]),
            ids_masked: bench.zeros(DType::I32, &[images, patches - workload.kept()]),
            ids_restore: bench.zeros(DType::I32, &[images, patches]),
        }
    }
}
