//! The driver on stand-ins for libcuda and libcublasLt (`src/cuda/fake`), which do all work as late as the order allows.
//!
//! Libraries are found by `LD_LIBRARY_PATH`, which is read when a process starts: so each test builds the stand-ins and runs
//! itself again in a process that finds them.

use std::path::Path;
use std::process::Command;

use half::bf16;

mod buffers;
mod epilogues;
mod slices;
mod streams;

use super::*;
use crate::DType;
use crate::cuda::driver::{Epilogue, Matrix};

const CHILD: &str = "PIXMIM_TEST_ON_FAKE";

fn compile(folder: &Path, source: &str, library: &str, link: &[&str]) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/fake");
    let status = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()))
        .current_dir(folder)
        .args(["-shared", "-fPIC", "-O1", "-o", library])
        .arg(format!("-Wl,-soname,{library}"))
        .arg(sources.join(source))
        .args(link)
        .status()
        .unwrap();
    assert!(status.success(), "{source} does not compile");
}

/// In the process that finds the stand-ins a GPU; in the one of the test harness `None`, after that other one succeeded.
fn on_fake(test: &str, variables: &[(&str, &str)]) -> Option<Nvidia> {
    start_on_fake(test, variables).map(Result::unwrap)
}

/// As [`on_fake`], where opening the GPU may fail.
fn start_on_fake(test: &str, variables: &[(&str, &str)]) -> Option<Result<Nvidia>> {
    if std::env::var_os(CHILD).is_some() {
        let found = Box::leak(Box::new(probe::find().unwrap()));
        return Some(Nvidia::start(found, 0, &[("fake", b"image")]));
    }
    let folder = tempfile::tempdir().unwrap();
    compile(folder.path(), "cuda.c", "libcuda.so.1", &[]);
    compile(folder.path(), "cublaslt.c", "libcublasLt.so.13", &["./libcuda.so.1", "-lm"]);
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", &format!("cuda::nvidia::tests::{test}")])
        .env_remove("PIXMIM_MATMUL")
        .env_remove("PIXMIM_EPILOGUES")
        .env("LD_LIBRARY_PATH", folder.path())
        .env(CHILD, "1")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    None
}

/// Numbers that differ, exact in bf16.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 13) % 31) as f32 / 4.0 - 3.0).collect()
}

fn bytes(numbers: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_ne_bytes()).collect(),
        _ => bytemuck::cast_slice(numbers).to_vec(),
    }
}

fn floats(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Bf16 => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_ne_bytes(b.try_into().unwrap()).to_f32())
            .collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect(),
    }
}

fn upload(gpu: &Nvidia, src: &[u8]) -> DevPtr {
    let memory = gpu.alloc(src.len(), "test").unwrap();
    gpu.upload(memory, src).unwrap();
    memory
}

fn download(gpu: &Nvidia, src: DevPtr, count: usize) -> Vec<u8> {
    let mut dst = vec![0; count];
    gpu.download(&mut dst, src).unwrap();
    dst
}

fn fill(gpu: &Nvidia, out: DevPtr, count: u32, value: u32) -> Result<()> {
    let params: Vec<u8> =
        [out.0.to_ne_bytes().as_slice(), &count.to_ne_bytes(), &value.to_ne_bytes()].concat();
    gpu.launch(&Launch { kernel: "fill", grid: 1, block: 32, shared_bytes: 0, params: &params })
}

#[test]
fn a_gpu_that_another_process_holds_is_no_device() {
    let test = "a_gpu_that_another_process_holds_is_no_device";
    let Some(refused) = start_on_fake(test, &[("FAKE_BUSY", "1")]) else { return };
    let error = refused.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let error = error.to_string();
    assert!(
        error.starts_with("--device cuda: Fake GPU does not open (CUDA_ERROR_DEVICE_UNAVAILABLE"),
        "{error}"
    );
}

#[test]
fn copies_keep_the_order_of_calls() {
    let Some(gpu) = on_fake("copies_keep_the_order_of_calls", &[]) else { return };
    // Small, as large as small ones get, large, larger than one staging area.
    for (round, count) in [4, 64 << 10, 1_000_004, (160 << 20) + 4].into_iter().enumerate() {
        let [a, b] =
            [7, 9].map(|seed| -> Vec<u8> { (0..count).map(|i| (i / 3 * seed) as u8).collect() });
        let memory = gpu.alloc(count, "test").unwrap();
        let copy = gpu.alloc(count, "test").unwrap();
        gpu.upload(memory, &a).unwrap();
        gpu.copy(copy, memory, count).unwrap();
        gpu.upload(memory, &b).unwrap();
        assert_eq!(download(&gpu, copy, count), a, "round {round}: the copy saw the later upload");
        assert_eq!(download(&gpu, memory, count), b, "round {round}");
        fill(&gpu, memory, 1, 0x0102_0304).unwrap();
        gpu.clear(memory.offset(4), count - 4).unwrap();
        let cleared = download(&gpu, memory, count);
        assert_eq!(cleared[..4], 0x0102_0304_u32.to_ne_bytes());
        assert!(cleared[4..].iter().all(|byte| *byte == 0));
        gpu.free(memory);
        gpu.free(copy);
    }
}

#[test]
fn many_uploads_wait_for_their_slots() {
    let Some(gpu) = on_fake("many_uploads_wait_for_their_slots", &[]) else { return };
    for bytes in [8, 100_000] {
        let sources: Vec<Vec<u8>> = (0..50).map(|i| vec![i; bytes]).collect();
        let memories: Vec<_> = sources.iter().map(|src| upload(&gpu, src)).collect();
        for (memory, src) in memories.into_iter().zip(&sources) {
            assert_eq!(&download(&gpu, memory, bytes), src);
            gpu.free(memory);
        }
    }
}

#[test]
fn uploads_work_without_memory_to_spare() {
    // cublasLt's workspace, the destination, and less than a staging area.
    let bytes = (32 << 20) + (3 << 20) + (1 << 20);
    let most = bytes.to_string();
    let test = "uploads_work_without_memory_to_spare";
    let Some(gpu) = on_fake(test, &[("FAKE_MEMORY", &most)]) else { return };
    let src: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 5) as u8).collect();
    let memory = upload(&gpu, &src);
    assert_eq!(download(&gpu, memory, src.len()), src);
    let error = gpu.alloc(2 << 20, "activations").unwrap_err();
    assert!(
        matches!(error, Error::OutOfMemory { what: "activations", bytes: 0x20_0000 }),
        "{error}"
    );
    gpu.free(memory);
    gpu.free(DevPtr::default());
}

#[test]
fn a_launch_that_cannot_be_is_refused_before_it_is_made() {
    let test = "a_launch_that_cannot_be_is_refused_before_it_is_made";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let launch = |kernel, shared_bytes, params| {
        gpu.launch(&Launch { kernel, grid: 2, block: 64, shared_bytes, params })
    };
    let error = launch("filll", 0, &[0; 16]).unwrap_err().to_string();
    assert!(error.contains("filll"), "{error}");
    let error = launch("fill", 0, &[0; 8]).unwrap_err().to_string();
    assert!(error.contains("16 bytes, 8 were given"), "{error}");
    let error = launch("fill", 1 << 20, &[0; 16]).unwrap_err().to_string();
    assert!(error.contains("CUDA_ERROR_INVALID_VALUE"), "{error}");
    // Beyond 48 KiB a kernel must ask; less than before needs no asking.
    for kib in [100, 60, 227] {
        launch("fill", kib << 10, &[0; 16]).unwrap();
    }
    let error = gpu
        .launch(&Launch { kernel: "fill", grid: 0, block: 64, shared_bytes: 0, params: &[0; 16] })
        .unwrap_err()
        .to_string();
    assert!(error.contains("fill") && error.contains("0 blocks"), "{error}");
    gpu.synchronize().unwrap();
}

#[test]
fn an_error_of_the_gpu_names_the_kernels_before_it() {
    let Some(gpu) = on_fake("an_error_of_the_gpu_names_the_kernels_before_it", &[]) else { return };
    let memory = gpu.alloc(4, "test").unwrap();
    fill(&gpu, memory, 1, 1).unwrap();
    gpu.synchronize().unwrap();
    let launch = Launch { kernel: "fail", grid: 1, block: 32, shared_bytes: 0, params: &[0; 8] };
    gpu.launch(&launch).unwrap();
    fill(&gpu, memory, 1, 1).unwrap();
    for _ in 0..2 {
        let error = gpu.synchronize().unwrap_err().to_string();
        assert!(error.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
        assert!(error.contains("illegal memory access"), "{error}");
        assert!(error.contains("fail, fill;"), "{error}");
    }
    for error in [
        gpu.download(&mut [0; 4], memory),
        gpu.upload(memory, &[0; 4]),
        gpu.upload(memory, &[0; 100_000]),
        gpu.copy(memory, memory, 4),
        gpu.clear(memory, 4),
    ] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("fail, fill;"), "{error}");
    }
    assert!(fill(&gpu, memory, 1, 1).is_err());
    gpu.free(memory);
}

#[test]
fn time_is_that_of_the_work_between() {
    let Some(gpu) = on_fake("time_is_that_of_the_work_between", &[]) else { return };
    let memory = gpu.alloc(4, "test").unwrap();
    let fill = |times| (0..times).try_for_each(|value| fill(&gpu, memory, 1, value));
    // What comes before and after is not counted; the stand-in's kernel takes a millisecond.
    fill(5).unwrap();
    let time = gpu.time(Box::new(|| fill(3))).unwrap();
    fill(7).unwrap();
    assert_eq!(time, Duration::from_millis(3));
    assert_eq!(gpu.time(Box::new(|| Ok(()))).unwrap(), Duration::ZERO);

    let refused = gpu.time(Box::new(|| Err(Error::invalid("work", "is none"))));
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    let launch = Launch { kernel: "fail", grid: 1, block: 32, shared_bytes: 0, params: &[0; 8] };
    let error = gpu.time(Box::new(|| gpu.launch(&launch))).unwrap_err().to_string();
    assert!(error.contains("fail;"), "{error}");
    gpu.free(memory);
}

#[test]
fn marks_tell_when_the_stream_reached_them() {
    let Some(gpu) = on_fake("marks_tell_when_the_stream_reached_them", &[]) else { return };
    let memory = gpu.alloc(4, "test").unwrap();
    let fill = |times| (0..times).try_for_each(|value| fill(&gpu, memory, 1, value));
    fill(5).unwrap();
    let mut clock = gpu.clock().unwrap();
    for times in [0, 3, 0, 2] {
        fill(times).unwrap();
        clock.mark().unwrap();
    }
    fill(7).unwrap();
    assert_eq!(clock.read().unwrap(), [0, 3, 3, 5].map(Duration::from_millis));

    // An event that is captured never tells the time, and asking it spoils the capture.
    gpu.begin_capture().unwrap();
    for refused in [gpu.clock().map(drop), clock.mark()] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("record"), "{error}");
    }
    drop(gpu.end_capture().unwrap());
    let launch = Launch { kernel: "fail", grid: 1, block: 32, shared_bytes: 0, params: &[0; 8] };
    gpu.launch(&launch).unwrap();
    let error = clock.mark().and_then(|()| clock.read()).unwrap_err().to_string();
    assert!(error.contains("fail;"), "{error}");
    gpu.free(memory);
    // The clock outlives its GPU.
    drop(gpu);
}

#[test]
fn a_recording_runs_as_often_as_it_is_replayed_and_outlives_its_gpu() {
    let test = "a_recording_runs_as_often_as_it_is_replayed_and_outlives_its_gpu";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let [a, b] = [0, 1].map(|_| upload(&gpu, &[5; 8]));
    let lost = gpu.alloc(8, "test").unwrap();
    let matmul = product(&gpu, Case { m: 3, n: 5, k: 2, ..CASE });
    gpu.matmul(&matmul.matmul).unwrap();
    gpu.synchronize().unwrap();

    gpu.begin_capture().unwrap();
    for refused in [
        gpu.upload(a, &[1; 8]),
        gpu.download(&mut [0; 8], a),
        gpu.alloc(8, "test").map(drop),
        gpu.begin_capture(),
        gpu.time(Box::new(|| Ok(()))).map(drop),
        gpu.matmul(&Matmul { m: 2, ..matmul.matmul }),
    ] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("record"), "{error}");
    }
    gpu.free(lost);
    gpu.copy(b, a, 8).unwrap();
    fill(&gpu, a, 2, 7).unwrap();
    gpu.matmul(&matmul.matmul).unwrap();
    let graph = gpu.end_capture().unwrap();

    assert_eq!(download(&gpu, b, 8), [5; 8], "recording must not run");
    gpu.clear(a, 8).unwrap();
    gpu.clear(matmul.matmul.out.ptr, 4).unwrap();
    graph.replay().unwrap();
    assert_eq!(download(&gpu, b, 8), [0; 8]);
    assert_eq!(download(&gpu, a, 8), [7, 0, 0, 0, 7, 0, 0, 0]);
    graph.replay().unwrap();
    assert_eq!(download(&gpu, b, 8), [7, 0, 0, 0, 7, 0, 0, 0]);
    matmul.check(&gpu);
    for memory in [a, b].into_iter().chain(matmul.memories) {
        gpu.free(memory);
    }
    drop(gpu);
    drop(graph);
}

#[test]
fn a_recording_that_fails_leaves_the_stream_usable() {
    let Some(gpu) = on_fake("a_recording_that_fails_leaves_the_stream_usable", &[]) else { return };
    gpu.begin_capture().unwrap();
    // Waiting is what spoils a recording.
    assert!(gpu.synchronize().is_err());
    assert!(gpu.end_capture().is_err());
    let memory = gpu.alloc(4, "test").unwrap();
    fill(&gpu, memory, 1, 3).unwrap();
    assert_eq!(download(&gpu, memory, 4), 3_u32.to_ne_bytes());
    gpu.free(memory);
}

#[derive(Clone, Copy)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    batch: usize,
    dtypes: (DType, DType),
    transposed: (bool, bool),
    bias: bool,
    /// 0: nothing; 1: the result; 2: another matrix.
    add: usize,
}

const CASE: Case = Case {
    m: 3,
    n: 5,
    k: 7,
    batch: 1,
    dtypes: (DType::F32, DType::F32),
    transposed: (false, false),
    bias: false,
    add: 0,
};

/// A product in the memory of the GPU, and what it must be.
struct Problem {
    matmul: Matmul,
    memories: Vec<DevPtr>,
    expected: Vec<(usize, f32)>,
}

impl Problem {
    fn check(&self, gpu: &Nvidia) {
        let out = self.matmul.out;
        let size = out.dtype.size_bytes();
        let count = self.expected.iter().map(|(at, _)| at + 1).max().unwrap();
        let found = floats(&download(gpu, out.ptr, count * size), out.dtype);
        for (at, expected) in &self.expected {
            let tolerance = match out.dtype {
                DType::Bf16 => expected.abs() / 256.0 + 1e-6,
                _ => 0.0,
            };
            assert!((found[*at] - expected).abs() <= tolerance, "{:?}: {at}", self.matmul);
        }
    }
}

/// All numbers are multiples of 1/16 below 2^20, so f32 sums are exact in any order.
fn product(gpu: &Nvidia, case: Case) -> Problem {
    let Case { m, n, k, batch, dtypes: (factors, result), transposed, bias, add } = case;
    let mut memories = Vec::new();
    let mut matrix = |rows: usize, cols: usize, dtype: DType, transposed: bool, seed: usize| {
        let (stored_rows, stored_cols) = if transposed { (cols, rows) } else { (rows, cols) };
        // Rows and matrices lie apart by different gaps.
        let row_stride = stored_cols + seed;
        let batch_stride = stored_rows * row_stride + 3 * seed;
        let data = numbers(batch * batch_stride, seed);
        let ptr = upload(gpu, &bytes(&data, dtype));
        memories.push(ptr);
        let element = move |i: usize, row: usize, col: usize| {
            let (row, col) = if transposed { (col, row) } else { (row, col) };
            i * batch_stride + row * row_stride + col
        };
        (Matrix { ptr, dtype, row_stride, batch_stride, transposed }, data, element)
    };
    let (a, a_data, a_at) = matrix(m, k, factors, transposed.0, 1);
    let (b, b_data, b_at) = matrix(k, n, factors, transposed.1, 2);
    let (out, out_data, out_at) = matrix(m, n, result, false, 3);
    let (other, other_data, _) = matrix(m, n, result, false, 3);
    let bias_data = numbers(n, 5);
    let bias_ptr = upload(gpu, &bytes(&bias_data, result));
    memories.push(bias_ptr);
    let mut expected = Vec::new();
    for i in 0..batch {
        for row in 0..m {
            for col in 0..n {
                let at = out_at(i, row, col);
                let products = (0..k).map(|j| a_data[a_at(i, row, j)] * b_data[b_at(i, j, col)]);
                let added = [0.0, out_data[at], other_data[at]][add];
                let bias = if bias { bias_data[col] } else { 0.0 };
                expected.push((at, products.sum::<f32>() + added + bias));
            }
        }
    }
    let add = [None, Some(out.ptr), Some(other.ptr)][add];
    let bias = bias.then_some(bias_ptr);
    let epilogue = Epilogue::None;
    let matmul = Matmul { m, n, k, batch, a, b, out, bias, add, epilogue };
    Problem { matmul, memories, expected }
}

#[test]
fn products_are_right_whatever_is_transposed_added_or_batched() {
    let test = "products_are_right_whatever_is_transposed_added_or_batched";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let (f32, bf16) = (DType::F32, DType::Bf16);
    for dtypes in [(f32, f32), (bf16, bf16), (bf16, f32)] {
        for flags in 0..48 {
            let case = Case {
                dtypes,
                transposed: (flags & 1 != 0, flags & 2 != 0),
                bias: flags & 4 != 0,
                batch: if flags & 8 != 0 { 4 } else { 1 },
                add: flags / 16,
                ..CASE
            };
            let problem = product(&gpu, case);
            gpu.matmul(&problem.matmul).unwrap();
            problem.check(&gpu);
            problem.memories.iter().for_each(|memory| gpu.free(*memory));
        }
    }
    let problem = product(&gpu, Case { dtypes: (f32, bf16), ..CASE });
    let error = gpu.matmul(&problem.matmul).unwrap_err().to_string();
    assert!(error.contains("dtypes"), "{error}");
    problem.memories.iter().for_each(|memory| gpu.free(*memory));
}

/// First word of each exported algorithm: its place in the stand-in's list.
fn algorithms(plans: &[u8]) -> Vec<u64> {
    // A plan is 96 bytes of problem and 80 of algorithm.
    let start = plans.len() % 176;
    let word = |plan: &[u8]| u64::from_le_bytes(plan[96..104].try_into().unwrap());
    plans[start..].chunks_exact(176).map(word).collect()
}

#[test]
fn the_fastest_algorithm_is_pinned_and_taken_over() {
    let test = "the_fastest_algorithm_is_pinned_and_taken_over";
    let Some(gpu) = on_fake(test, &[("PIXMIM_MATMUL", "timed")]) else { return };
    let problem = product(&gpu, CASE);
    gpu.matmul(&problem.matmul).unwrap();
    problem.check(&gpu);
    let plans = gpu.plans();
    assert_eq!(algorithms(&plans), [2]);

    // A plan for the slow algorithm, as an earlier run might have left it.
    let mut slow = plans.clone();
    let at = plans.len() - 80;
    slow[at] = 0;
    let found = probe::find().unwrap();
    let other = Nvidia::start(&found, 0, &[("fake", b"image")]).unwrap();
    assert_eq!(other.load_plans(&slow), Ok(1));
    assert_eq!(other.plans(), slow, "what is not used yet is not lost");
    other.matmul(&problem.matmul).unwrap();
    other.synchronize().unwrap();
    assert_eq!(other.plans(), slow);

    // One that this GPU refuses is planned anew.
    let mut refused = plans.clone();
    refused[at] = 9;
    let third = Nvidia::start(&found, 0, &[("fake", b"image")]).unwrap();
    assert_eq!(third.load_plans(&refused), Ok(1));
    third.matmul(&problem.matmul).unwrap();
    assert_eq!(algorithms(&third.plans()), [2]);
    assert!(third.load_plans(b"something else").unwrap_err().contains("damaged"));
    problem.memories.iter().for_each(|memory| gpu.free(*memory));
}

#[test]
fn the_first_algorithm_is_taken_unless_they_are_timed() {
    let test = "the_first_algorithm_is_taken_unless_they_are_timed";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let problem = product(&gpu, CASE);
    gpu.matmul(&problem.matmul).unwrap();
    problem.check(&gpu);
    assert_eq!(algorithms(&gpu.plans()), [0]);
    problem.memories.iter().for_each(|memory| gpu.free(*memory));
}

#[test]
fn the_first_algorithm_is_taken_without_memory_to_time() {
    let test = "the_first_algorithm_is_taken_without_memory_to_time";
    let most = ((32 << 20) + 900).to_string();
    let variables = [("FAKE_MEMORY", most.as_str()), ("PIXMIM_MATMUL", "timed")];
    let Some(gpu) = on_fake(test, &variables) else { return };
    let problem = product(&gpu, Case { m: 2, n: 2, k: 2, ..CASE });
    // What is left does not hold the three matrices once more.
    let rest = (1..900).rev().find_map(|bytes| gpu.alloc(bytes, "rest").ok()).unwrap();
    gpu.matmul(&problem.matmul).unwrap();
    problem.check(&gpu);
    assert_eq!(algorithms(&gpu.plans()), [0]);
    problem.memories.iter().chain([&rest]).for_each(|memory| gpu.free(*memory));
}

#[test]
fn every_function_called_is_looked_up_first() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda");
    let mut checked = 0;
    for file in [
        "nvidia/copies.rs",
        "nvidia/graph.rs",
        "nvidia/handles.rs",
        "nvidia/kernels.rs",
        "nvidia/outbox.rs",
        "nvidia.rs",
        "probe.rs",
        "probe/cublaslt.rs",
        "cublaslt/descriptors.rs",
        "cublaslt.rs",
    ] {
        let text = std::fs::read_to_string(sources.join(file)).unwrap();
        let calls = text.split("sys::").skip(1).filter_map(|rest| {
            let (name, _) = rest.split_once('(')?;
            let is_call = name.starts_with("cu")
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            (is_call && name != "culib").then_some(name)
        });
        for name in calls {
            let known = probe::driver_symbols().chain(probe::cublaslt_symbols()).any(|s| s == name);
            assert!(known, "{file} calls {name}, which the probe does not look up");
            checked += 1;
        }
        assert!(!text.contains("result::{") && !text.contains("::safe"), "{file}");
    }
    assert!(checked >= probe::driver_symbols().count() + probe::cublaslt_symbols().count() - 2);
}
