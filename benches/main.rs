//! `cargo bench`: every op at the shapes of real networks, the whole step, and the data path; each row with its share
//! of what this machine reaches, measured in the same run. `cargo bench -- layer_norm` picks by a regular expression.
//!
//! It runs on a GPU where there is one, else on the CPU with smaller batches under the same names, and says so.
//! `PIXMIM_BENCH_DEVICE=cpu`, `cuda` or `simt` asks for one; `simt` is the host executor, tiny, to see that all runs.
//! docs/benchmarks.md says what is timed and what the columns mean.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on stops")]
#![expect(clippy::print_stdout, reason = "its output")]

mod data;
mod inputs;
mod ops;
mod peaks;
mod report;
mod step;

#[path = "../examples/step_speed/workload.rs"]
mod workload;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use criterion::{Bencher, BenchmarkId, Criterion, Throughput};
use inputs::{Inputs, noise};
use peaks::Measured;
use pixmim::ops::cost::Cost;
use pixmim::{DType, Device, Result};
use report::{Report, Row};
use workload::{LSMAE, Precision, SMALL64, TINY, VIT_B, VIT_H, VIT_L, Workload};

/// The networks, with the images of a batch of the ops on a GPU and on the CPU.
const NETWORKS: [(Workload, usize, usize); 5] =
    [(SMALL64, 16_384, 64), (VIT_B, 4096, 4), (VIT_L, 4096, 4), (VIT_H, 1024, 2), (LSMAE, 1024, 1)];
/// On the CPU, ops that only move numbers take so many times the images, or the caches would hold them.
const MOVED_ON_CPU: usize = 16;

fn main() {
    let mut bench = Bench::new();
    match &bench.dev {
        Device::Cuda(gpu) => println!("on {}", gpu.properties().name),
        _ => println!("on the CPU: no GPU is timed, and batches are small"),
    }
    ops::bench(&mut bench);
    step::bench(&mut bench);
    data::bench(&mut bench);
    bench.finish();
}

/// Precisions of products that are timed side by side.
const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

fn name(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}

/// One benchmark of an op. Its id is `op/direction/shape` on every device.
struct Case<'a> {
    op: &'a str,
    direction: &'a str,
    shape: &'a str,
    /// Images, or parameters for ops that know no images.
    batch: usize,
    /// Of products, and part of the id, where both are timed; else the device's own.
    precision: Option<Precision>,
    cost: Cost,
}

/// Where and how all is timed, and what was.
struct Bench {
    criterion: Criterion,
    dev: Device,
    /// Of activations, where both precisions are not timed: bf16 on a GPU.
    precision: Precision,
    networks: Vec<Workload>,
    /// Images of those that only move numbers, over those of the others.
    moved: usize,
    /// Everything once and small: `--test`, or on the executor.
    only_tried: bool,
    noise: Vec<f32>,
    criterion_folder: PathBuf,
    rows: Vec<Row>,
}

impl Bench {
    fn new() -> Self {
        let name = std::env::var("PIXMIM_BENCH_DEVICE").unwrap_or_else(|_| "auto".into());
        let dev = workload::device(&name).unwrap();
        let is_gpu = matches!(dev, Device::Cuda(_));
        // As criterion judges.
        let has = |flag: &str| std::env::args().any(|arg| arg == flag);
        let is_test = has("--test") || !has("--bench");
        let only_tried = is_test || name == "simt";
        let networks = match name.as_str() {
            "simt" => vec![TINY],
            _ => NETWORKS
                .iter()
                .map(|&(network, on_gpu, on_cpu)| {
                    let images = if is_gpu { on_gpu } else { on_cpu };
                    Workload { images: if is_test { 1 } else { images }, ..network }
                })
                .collect(),
        };
        let moved = if is_gpu || is_test { 1 } else { MOVED_ON_CPU };
        let criterion_folder = criterion_folder();
        let criterion = Criterion::default()
            .output_directory(&criterion_folder)
            .sample_size(10)
            .nresamples(10_000)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(500))
            .configure_from_args();
        let precision = if is_gpu { Precision::Bf16 } else { Precision::F32 };
        let (noise, rows) = (noise(), Vec::new());
        Self {
            criterion,
            dev,
            precision,
            networks,
            moved,
            only_tried,
            noise,
            criterion_folder,
            rows,
        }
    }

    /// The dtype of tensors in a precision.
    fn dtype(&self, precision: Precision) -> DType {
        precision.on(&self.dev).1
    }

    /// The networks with batches for ops that only move numbers.
    fn moved(&self) -> Vec<Workload> {
        let moved = |w: &Workload| Workload { images: self.moved * w.images, ..*w };
        self.networks.iter().map(moved).collect()
    }

    /// Times `run` as `make` sets it up, unless it is filtered out: on a GPU by events around the launches, on the
    /// CPU by the clock.
    fn time<R: FnMut(&Device) -> Result<()>>(
        &mut self,
        case: Case<'_>,
        make: impl FnOnce(&Inputs<'_>) -> R,
    ) {
        let precision = case.precision.unwrap_or(self.precision);
        let (dev, _) = precision.on(&self.dev);
        let direction = match case.precision {
            Some(precision) => format!("{} {}", case.direction, name(precision)),
            None => case.direction.to_owned(),
        };
        let Cost { bytes, flops } = case.cost;
        let work = match flops {
            0 => Throughput::Bytes(bytes),
            _ => Throughput::ElementsAndBytes { elements: flops, bytes },
        };
        let noise = std::mem::take(&mut self.noise);
        let inputs = Inputs { dev: &dev, noise: &noise };
        let (mut make, mut run) = (Some(make), None);
        let took = self.measure([case.op, &direction, case.shape], Some(work), |b| {
            // Made at the first use: criterion calls this for every sample.
            let run = run.get_or_insert_with(|| make.take().expect("made once")(&inputs));
            b.iter_custom(|times| dev.time(|| (0..times).try_for_each(|_| run(&dev))).unwrap());
        });
        self.noise = noise;
        self.rows.extend(took.map(|took| Row {
            op: case.op.into(),
            direction: case.direction.into(),
            shape: case.shape.into(),
            batch: case.batch,
            precision: name(precision),
            took,
            images_per_second: None,
            cost: Some(case.cost),
        }));
    }

    /// Hands a benchmark to criterion. The median time of a call, unless it was filtered out or only tried.
    fn measure(
        &mut self,
        id: [&str; 3],
        work: Option<Throughput>,
        body: impl FnMut(&mut Bencher<'_>),
    ) -> Option<Duration> {
        let begun = SystemTime::now();
        let mut group = self.criterion.benchmark_group(id[0]);
        if let Some(work) = work {
            group.throughput(work);
        }
        group.bench_function(BenchmarkId::new(id[1], id[2]), body);
        group.finish();
        let estimates = id.iter().fold(self.criterion_folder.clone(), |path, part| path.join(part));
        let estimates = estimates.join("new/estimates.json");
        // An older file is of another run; files are dated by a coarse clock.
        let written = estimates.metadata().and_then(|file| file.modified()).ok()?;
        if written + Duration::from_millis(100) < begun {
            return None;
        }
        let text = std::fs::read(&estimates).unwrap();
        let estimates: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let nanoseconds = estimates["median"]["point_estimate"].as_f64().unwrap();
        Some(Duration::from_secs_f64(nanoseconds / 1e9))
    }

    /// Prints and writes what was measured.
    fn finish(self) {
        if self.rows.is_empty() && !self.only_tried {
            return;
        }
        let peaks = Measured::new(&self.dev).unwrap();
        if self.rows.is_empty() {
            return;
        }
        let rows = peaks.rows.iter().cloned().chain(self.rows);
        let rows = rows.map(|row| {
            let roofs = peaks.of(row.precision);
            (row, roofs)
        });
        let report = Report { environment: environment(&self.dev), rows: rows.collect() };
        println!("\n{}", report.table());
        let folder = self.criterion_folder.with_file_name("bench");
        for path in report.write(&folder).unwrap() {
            println!("{}", path.display());
        }
    }
}

/// What a record must say about the run.
fn environment(dev: &Device) -> Vec<(&'static str, String)> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cpu = cpu.map_or(std::env::consts::ARCH, |(_, name)| name);
    let mut lines = vec![
        ("pixmim", pixmim::VERSION.to_owned()),
        ("rustc", pixmim::RUSTC.to_owned()),
        ("cpu", format!("{cpu}, {} threads", rayon::current_num_threads())),
    ];
    match dev {
        Device::Cuda(gpu) => {
            lines.push(("device", gpu.properties().name.clone()));
            #[cfg(feature = "cuda")]
            if let Ok(found) = pixmim::cuda::probe::probe() {
                lines.extend(found.to_string().lines().map(|line| ("found", line.to_owned())));
            }
        }
        _ => lines.push(("device", "cpu".into())),
    }
    lines
}

/// Where criterion writes: `CRITERION_HOME`, or below the folder that cargo built this program into.
fn criterion_folder() -> PathBuf {
    if let Some(home) = std::env::var_os("CRITERION_HOME") {
        return home.into();
    }
    let program = std::env::current_exe().unwrap();
    // target/release/deps/speed-0123456789abcdef
    let target = match program.parent() {
        Some(deps) if deps.ends_with("deps") => deps.ancestors().nth(2),
        _ => None,
    };
    target.unwrap_or(Path::new("target")).join("criterion")
}
