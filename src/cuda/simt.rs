//! The host executor as a driver: kernels run to their end at the launch, products on the CPU.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::driver::{
    Clock, DevPtr, Driver, Epilogue, Epilogues, Graph, HostClock, Launch, Matmul, Matrix,
    Properties,
};
use crate::cpu::gemm::{Mat, MatMut, matmul};
use crate::dtype::Element;
use crate::{DType, Error, Products, Result};

/// How the host executor runs kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimtOptions {
    /// 0: blocks, warps and lanes take turns in a fixed order; else in a random one that this seed decides. A kernel
    /// without races gives the same bits under every seed.
    pub seed: u32,
    /// Threads that run blocks; 0: one for each core.
    pub threads: u32,
    /// 1: every access to shared and global memory is checked for races and for reads of what nothing wrote; 0: not.
    pub checks: u32,
    /// Memory that it claims to have free, in bytes.
    pub memory_bytes: u64,
    /// Epilogues of products; a GPU takes them from `PIXMIM_EPILOGUES`.
    pub epilogues: Epilogues,
}

/// `PixmimSimtOptions` of kernels/simt/api.h.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct LaunchOptions {
    seed: u32,
    threads: u32,
    checks: u32,
}

impl Default for SimtOptions {
    fn default() -> Self {
        let epilogues = Epilogues::default();
        Self { seed: 0, threads: 0, checks: 1, memory_bytes: u64::MAX, epilogues }
    }
}

#[expect(unsafe_code, reason = "kernels/simt/api.h")]
mod api {
    use super::*;

    unsafe extern "C" {
        pub(super) fn pixmim_simt_launch(
            kernel: *const c_char,
            params: *const c_void,
            params_bytes: usize,
            grid: u32,
            block: u32,
            shared_bytes: u32,
            options: *const LaunchOptions,
            text: *mut c_char,
            text_bytes: usize,
        ) -> c_int;
        pub(super) fn pixmim_simt_alloc(
            bytes: usize,
            name: *const c_char,
            front: c_int,
        ) -> *mut c_void;
        pub(super) fn pixmim_simt_free(memory: *mut c_void);
        pub(super) fn pixmim_simt_wrote(memory: *mut c_void, bytes: usize);
        pub(super) fn pixmim_simt_reads(
            memory: *const c_void,
            bytes: usize,
            text: *mut c_char,
            text_bytes: usize,
        ) -> c_int;
    }
}

/// The host executor.
#[derive(Debug)]
pub(super) struct Simt {
    options: LaunchOptions,
    properties: Properties,
    epilogues: Epilogues,
    /// What is recorded while capturing.
    recording: Mutex<Option<Vec<Command>>>,
}

/// Work that can be recorded and run again.
#[derive(Clone, Debug)]
enum Command {
    Launch { kernel: &'static str, grid: u32, block: u32, shared_bytes: u32, params: Vec<u8> },
    Matmul(Matmul),
    Copy { dst: DevPtr, src: DevPtr, bytes: usize },
    Clear { dst: DevPtr, bytes: usize },
}

/// Bytes of a message from the executor.
const TEXT_BYTES: usize = 2048;

/// The message in a buffer that the executor filled.
fn message(text: &[u8; TEXT_BYTES]) -> String {
    CStr::from_bytes_until_nul(text)
        .map_or_else(|_| "unknown".into(), |text| text.to_string_lossy().into_owned())
}

impl Simt {
    pub(super) fn new(options: SimtOptions) -> Result<Self> {
        let able = std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("fma")
            && std::arch::is_x86_feature_detected!("f16c");
        if !able {
            return Err(Error::NoDevice {
                asked: "simt".into(),
                why: "the host executor needs a CPU with AVX2, FMA and F16C; use --device cpu"
                    .into(),
            });
        }
        let properties = Properties {
            name: "host executor".into(),
            multiprocessors: 4,
            // That of an H200.
            shared_bytes: 232_448,
            memory_bytes: options.memory_bytes,
            executor: true,
        };
        let SimtOptions { seed, threads, checks, epilogues, .. } = options;
        let options = LaunchOptions { seed, threads, checks };
        Ok(Self { options, properties, epilogues, recording: Mutex::new(None) })
    }

    /// Refuses what a GPU cannot do while its work is recorded.
    fn expect_no_recording(&self, action: &'static str) -> Result<()> {
        let recording = self.recording.lock().unwrap_or_else(|poison| poison.into_inner());
        match *recording {
            Some(_) => Err(Error::Gpu { action, why: "its work is being recorded".into() }),
            None => Ok(()),
        }
    }

    /// Runs a command, or records it.
    fn enqueue(&self, command: Command) -> Result<()> {
        let mut recording = self.recording.lock().unwrap_or_else(|poison| poison.into_inner());
        match &mut *recording {
            Some(commands) => {
                commands.push(command);
                Ok(())
            }
            None => {
                drop(recording);
                run(&command, self.options)
            }
        }
    }
}

#[expect(unsafe_code, reason = "device addresses are addresses of this process")]
fn run(command: &Command, options: LaunchOptions) -> Result<()> {
    match command {
        Command::Launch { kernel, grid, block, shared_bytes, params } => {
            let name = CString::new(*kernel).expect("a kernel's name has no zero byte");
            let mut text = [0; TEXT_BYTES];
            // SAFETY: all pointers lead to as many bytes as are said, and the executor keeps none. What the kernel reads
            // and writes is checked by the executor against its own buffers.
            let failed = unsafe {
                api::pixmim_simt_launch(
                    name.as_ptr(),
                    params.as_ptr().cast(),
                    params.len(),
                    *grid,
                    *block,
                    *shared_bytes,
                    &options,
                    text.as_mut_ptr().cast(),
                    TEXT_BYTES,
                )
            };
            if failed != 0 {
                return Err(Error::Kernel { kernel, why: message(&text) });
            }
            Ok(())
        }
        Command::Matmul(matmul) => multiply(matmul),
        Command::Copy { dst, src, bytes } => {
            let (from, into) = (read::<u8>(*src, *bytes)?, write::<u8>(*dst, *bytes)?);
            into.copy_from_slice(from);
            Ok(())
        }
        Command::Clear { dst, bytes } => {
            write::<u8>(*dst, *bytes)?.fill(0);
            Ok(())
        }
    }
}

/// Elements that a command reads.
#[expect(unsafe_code, reason = "device addresses are addresses of this process")]
fn read<'a, T: Element>(at: DevPtr, elems: usize) -> Result<&'a [T]> {
    let (ptr, mut text) = (at.0 as *const T, [0; TEXT_BYTES]);
    // SAFETY: the executor only compares the range with its buffers, and writes no more than `text` holds.
    let failed = unsafe {
        let bytes = elems * size_of::<T>();
        api::pixmim_simt_reads(ptr.cast(), bytes, text.as_mut_ptr().cast(), TEXT_BYTES)
    };
    if failed != 0 || !ptr.is_aligned() {
        return Err(Error::Gpu { action: "read memory", why: message(&text) });
    }
    // SAFETY: the range lies inside one buffer of the executor, was written, and is aligned, as was just asked. Ops hand
    // out disjoint views, so nobody writes it during a command; a command's slices do not outlive it.
    Ok(unsafe { std::slice::from_raw_parts(ptr, elems) })
}

/// Elements that a command overwrites, or updates if it has read them.
#[expect(unsafe_code, reason = "device addresses are addresses of this process")]
fn write<'a, T: Element>(at: DevPtr, elems: usize) -> Result<&'a mut [T]> {
    let ptr = at.0 as *mut T;
    // SAFETY: the executor marks the range in its buffers; a range outside of them it ignores, and `read` refuses below.
    unsafe { api::pixmim_simt_wrote(ptr.cast(), elems * size_of::<T>()) };
    read::<T>(at, elems)?;
    // SAFETY: as in `read`; and the op that enqueued the command borrowed the tensor exclusively.
    Ok(unsafe { std::slice::from_raw_parts_mut(ptr, elems) })
}

/// The elements of matrix `index` of a batch, widened, without gaps.
fn widened(matrix: &Matrix, index: usize, rows: usize, cols: usize) -> Result<Vec<f32>> {
    let start = matrix.ptr.offset(index * matrix.batch_stride * matrix.dtype.size_bytes());
    let mut dense = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        let at = start.offset(row * matrix.row_stride * matrix.dtype.size_bytes());
        match matrix.dtype {
            DType::Bf16 => dense.extend(read::<bf16>(at, cols)?.iter().map(|x| x.to_f32())),
            _ => dense.extend_from_slice(read::<f32>(at, cols)?),
        }
    }
    Ok(dense)
}

fn multiply(product: &Matmul) -> Result<()> {
    let Matmul { m, n, k, batch, a, b, out, bias, add, epilogue } = *product;
    product.check_epilogue().map_err(|why| Error::Gpu { action: "multiply", why })?;
    let bias =
        bias.map(|ptr| widened(&Matrix { ptr, row_stride: n, batch_stride: 0, ..out }, 0, 1, n));
    let bias = bias.transpose()?;
    for index in 0..batch {
        let (a_rows, a_cols) = if a.transposed { (k, m) } else { (m, k) };
        let (b_rows, b_cols) = if b.transposed { (n, k) } else { (k, n) };
        let (lhs, rhs) = (widened(&a, index, a_rows, a_cols)?, widened(&b, index, b_rows, b_cols)?);
        let (lhs, rhs) = (Mat::new(&lhs, a_rows, a_cols), Mat::new(&rhs, b_rows, b_cols));
        let lhs = if a.transposed { lhs.t() } else { lhs };
        let rhs = if b.transposed { rhs.t() } else { rhs };
        if let Epilogue::RowSums(ptr) = epilogue {
            let ones = vec![1.0; k];
            let sums = MatMut::new(write::<f32>(ptr, m)?, m, 1);
            matmul(sums, lhs, Mat::new(&ones, k, 1), false, Products::F32);
        }
        let mut sums = match add {
            Some(ptr) => widened(&Matrix { ptr, ..out }, index, m, n)?,
            None => vec![0.0; m * n],
        };
        matmul(MatMut::new(&mut sums, m, n), lhs, rhs, true, Products::F32);
        if let Some(bias) = &bias {
            for row in sums.chunks_exact_mut(n) {
                row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            }
        }
        match epilogue {
            Epilogue::None | Epilogue::RowSums(_) => {}
            Epilogue::Gelu(ptr) => {
                store(&Matrix { ptr, ..out }, index, &sums, n)?;
                sums.iter_mut().for_each(|x| *x = tanh_gelu(*x)[0]);
            }
            Epilogue::GeluSlope(ptr) => {
                let pre = widened(&Matrix { ptr, ..out }, index, m, n)?;
                sums.iter_mut().zip(pre).for_each(|(x, pre)| *x *= tanh_gelu(pre)[1]);
            }
        }
        store(&out, index, &sums, n)?;
    }
    Ok(())
}

/// Writes matrix `index` of a batch, rounded to its dtype.
fn store(matrix: &Matrix, index: usize, dense: &[f32], cols: usize) -> Result<()> {
    let bytes = matrix.dtype.size_bytes();
    let start = matrix.ptr.offset(index * matrix.batch_stride * bytes);
    for (row, dense) in dense.chunks_exact(cols).enumerate() {
        let at = start.offset(row * matrix.row_stride * bytes);
        match matrix.dtype {
            DType::Bf16 => write::<bf16>(at, cols)?.convert_from_f32_slice(dense),
            _ => write::<f32>(at, cols)?.copy_from_slice(dense),
        }
    }
    Ok(())
}

/// GELU and its slope in the form of cublasLt's manual: `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`.
fn tanh_gelu(x: f32) -> [f32; 2] {
    const SCALE: f32 = 0.797_884_6;
    const CUBE: f32 = 0.044_715;
    let tanh = (SCALE * (x + CUBE * x * x * x)).tanh();
    let slope = SCALE * (1.0 + 3.0 * CUBE * x * x) * (1.0 - tanh * tanh);
    [0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh + x * slope)]
}

impl Driver for Simt {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    #[expect(unsafe_code, reason = "the signature")]
    unsafe fn on_stream(&self, _stream: *mut c_void) -> Result<Option<Arc<dyn Driver>>> {
        Ok(None)
    }

    #[cfg(feature = "cuda")]
    fn context(&self) -> Option<usize> {
        None
    }

    fn plans(&self) -> Vec<u8> {
        Vec::new()
    }

    fn load_plans(&self, plans: &[u8]) -> Result<usize, String> {
        if plans.is_empty() { Ok(0) } else { Err("the host executor has no plans".into()) }
    }

    fn available_bytes(&self) -> Result<u64> {
        Ok(self.properties.memory_bytes)
    }

    #[expect(unsafe_code, reason = "the executor's own allocator")]
    fn alloc(&self, bytes: usize, what: &'static str) -> Result<DevPtr> {
        self.expect_no_recording("allocate")?;
        let name = CString::new(what).expect("an arena's name has no zero byte");
        // SAFETY: the name is a C string; the executor copies it.
        let memory = unsafe { api::pixmim_simt_alloc(bytes, name.as_ptr(), 0) };
        if memory.is_null() {
            return Err(Error::OutOfMemory { what, bytes });
        }
        Ok(DevPtr(memory.expose_provenance() as u64))
    }

    #[expect(unsafe_code, reason = "the executor's own allocator")]
    fn free(&self, memory: DevPtr) {
        // SAFETY: the address came from `alloc` and is given back once, by the arena that owned it; no command runs
        // beside, as commands run to their end.
        unsafe { api::pixmim_simt_free(memory.0 as *mut c_void) }
    }

    fn upload(&self, dst: DevPtr, src: &[u8]) -> Result<()> {
        self.expect_no_recording("copy from the host")?;
        write::<u8>(dst, src.len())?.copy_from_slice(src);
        Ok(())
    }

    fn download(&self, dst: &mut [u8], src: DevPtr) -> Result<()> {
        self.expect_no_recording("copy to the host")?;
        dst.copy_from_slice(read::<u8>(src, dst.len())?);
        Ok(())
    }

    fn copy(&self, dst: DevPtr, src: DevPtr, bytes: usize) -> Result<()> {
        self.enqueue(Command::Copy { dst, src, bytes })
    }

    fn clear(&self, dst: DevPtr, bytes: usize) -> Result<()> {
        self.enqueue(Command::Clear { dst, bytes })
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch { kernel, grid, block, shared_bytes, params } = *launch;
        let params = params.to_vec();
        self.enqueue(Command::Launch { kernel, grid, block, shared_bytes, params })
    }

    fn epilogues(&self) -> Epilogues {
        self.epilogues
    }

    fn offers(&self, _matmul: &Matmul) -> Result<bool> {
        Ok(true)
    }

    fn matmul(&self, matmul: &Matmul) -> Result<()> {
        self.enqueue(Command::Matmul(*matmul))
    }

    fn synchronize(&self) -> Result<()> {
        self.expect_no_recording("finish its work")
    }

    fn time(&self, enqueue: Box<dyn FnOnce() -> Result<()> + '_>) -> Result<Duration> {
        self.expect_no_recording("time its work")?;
        let start = Instant::now();
        enqueue()?;
        Ok(start.elapsed())
    }

    fn clock(&self) -> Result<Box<dyn Clock>> {
        self.expect_no_recording("time its work")?;
        Ok(Box::new(HostClock::default()))
    }

    fn begin_capture(&self) -> Result<()> {
        self.expect_no_recording("begin to record")?;
        let mut recording = self.recording.lock().unwrap_or_else(|poison| poison.into_inner());
        *recording = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Graph>> {
        let mut recording = self.recording.lock().unwrap_or_else(|poison| poison.into_inner());
        let commands = recording.take().ok_or_else(|| Error::Gpu {
            action: "end a recording",
            why: "none was begun".into(),
        })?;
        Ok(Box::new(Recording { commands, options: self.options }))
    }
}

/// What was recorded, to be run again.
#[derive(Debug)]
struct Recording {
    commands: Vec<Command>,
    options: LaunchOptions,
}

impl Graph for Recording {
    fn replay(&self) -> Result<()> {
        self.commands.iter().try_for_each(|command| run(command, self.options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpu;

    #[test]
    #[expect(unsafe_code, reason = "calls an unsafe function")]
    fn on_any_stream_it_is_itself() {
        let gpu = Gpu::simt(SimtOptions::default()).unwrap();
        // SAFETY: null is a stream.
        let other = unsafe { gpu.on_stream(std::ptr::null_mut()) }.unwrap();
        assert_eq!(gpu.place(), other.place());
        let recording = other.record(|| {
            assert!(gpu.record(|| Ok(())).is_err(), "one recording for both");
            Ok(())
        });
        recording.unwrap().replay().unwrap();
    }

    #[test]
    fn time_is_that_of_the_calls() {
        let gpu = Gpu::simt(SimtOptions::default()).unwrap();
        let pause = Duration::from_millis(2);
        let time = gpu.time(|| {
            std::thread::sleep(pause);
            Ok(())
        });
        assert!(time.unwrap() >= pause);
        let error = gpu.record(|| gpu.time(|| Ok(())).map(drop)).unwrap_err().to_string();
        assert!(error.contains("being recorded"), "{error}");
    }
}
