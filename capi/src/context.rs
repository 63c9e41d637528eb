//! Where calls run: a device with what it needs, opened once and shared by all calls.

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pixmim_core::cuda::probe;
use pixmim_core::{Cpu, Device, Gpu, Products};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::status::{Failure, Outcome, PIXMIM_OUT_OF_MEMORY, guard, pixmim_status};
use crate::tensor::{expect_struct, pointee, pointee_mut};

/// The CPU as a device; CUDA ordinals count from 0.
pub const PIXMIM_CPU: i32 = -1;
/// Major version of this header: functions and structs change their meaning only with it.
pub const PIXMIM_ABI_MAJOR: u32 = 1;
/// Minor version of this header: grows with each addition.
pub const PIXMIM_ABI_MINOR: u32 = 0;

/// How a context computes. NULL in its place means zeros.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct pixmim_context_options {
    /// sizeof(pixmim_context_options).
    pub struct_size: u32,
    /// On the CPU: threads; 0: one for each core.
    pub threads: u32,
    /// On the CPU: 1 rounds the operands of products of f32 tensors to bf16, twice as fast where the CPU has AVX-512 BF16;
    /// 0: f32 products.
    pub bf16_products: u32,
    /// 0.
    pub reserved: u32,
}

/// A device that calls run on. May be used by several threads at once.
#[derive(Clone)]
pub struct pixmim_context {
    pub(crate) device: i32,
    /// The device, on a GPU with a stream of its own.
    base: Device,
    /// On a GPU: the same with each stream that was seen.
    streams: Arc<Mutex<HashMap<usize, Gpu>>>,
    /// On the CPU.
    pool: Option<Arc<ThreadPool>>,
    process: u32,
}

impl pixmim_context {
    pub(crate) fn new(device: i32, options: pixmim_context_options) -> Outcome<Self> {
        let pixmim_context_options { threads, bf16_products, reserved, .. } = options;
        if bf16_products > 1 || reserved != 0 || threads > 4096 {
            let why = "has bf16_products above 1, threads above 4096, or reserved not 0";
            return Err(Failure::invalid("options", why));
        }
        if device == PIXMIM_CPU {
            let products = if bf16_products == 1 { Products::Bf16 } else { Products::F32 };
            let pool = ThreadPoolBuilder::new().num_threads(threads as usize);
            let pool = pool.thread_name(|i| format!("pixmim-{i}")).build().map_err(|error| {
                Failure::new(PIXMIM_OUT_OF_MEMORY, format!("cannot start threads: {error}"))
            })?;
            return Ok(Self::with(device, Device::Cpu(Cpu { products }), Some(pool)));
        }
        let ordinal = usize::try_from(device).map_err(|_| {
            let why = format!("is {device}; it is PIXMIM_CPU or the ordinal of a GPU");
            Failure::invalid("device", why)
        })?;
        Ok(Self::with(device, Device::Cuda(Gpu::nvidia(ordinal)?), None))
    }

    pub(crate) fn with(device: i32, base: Device, pool: Option<ThreadPool>) -> Self {
        let process = std::process::id();
        Self { device, base, streams: Arc::default(), pool: pool.map(Arc::new), process }
    }

    /// The device on the caller's stream.
    fn on(&self, stream: *mut c_void) -> Outcome<Device> {
        let Device::Cuda(gpu) = &self.base else { return Ok(self.base.clone()) };
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = streams.get(&stream.addr()) {
            return Ok(Device::Cuda(gpu.clone()));
        }
        // SAFETY: the header asks of the caller that it is a stream of this device, alive until its work is done.
        let gpu = unsafe { gpu.on_stream(stream) }?;
        streams.insert(stream.addr(), gpu.clone());
        Ok(Device::Cuda(gpu))
    }

    /// Runs `body` with the device on the caller's stream, on the CPU inside the context's threads.
    pub(crate) fn run<T: Send>(
        &self,
        stream: *mut c_void,
        body: impl FnOnce(&Device) -> Outcome<T> + Send,
    ) -> Outcome<T> {
        self.expect_process()?;
        let dev = self.on(stream)?;
        self.install(|| body(&dev))
    }

    /// As [`run`](Self::run), on a stream of the context's own.
    pub(crate) fn run_apart<T: Send>(
        &self,
        body: impl FnOnce(&Device) -> Outcome<T> + Send,
    ) -> Outcome<T> {
        self.expect_process()?;
        self.install(|| body(&self.base))
    }

    fn expect_process(&self) -> Outcome {
        if std::process::id() == self.process {
            return Ok(());
        }
        let why = "was made in another process: a fork has neither its threads nor its GPU; make one after the fork";
        Err(Failure::invalid("context", why))
    }

    fn install<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        match &self.pool {
            Some(pool) => pool.install(body),
            None => body(),
        }
    }
}

/// What a device is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pixmim_device_info {
    /// sizeof(pixmim_device_info): set it in the first element.
    pub struct_size: u32,
    /// PIXMIM_CPU or a CUDA ordinal.
    pub device: i32,
    /// Whether a context can be made for it: 1 or 0.
    pub usable: i32,
    /// Compute capability of a GPU: 90 is 9.0. 0 for the CPU.
    pub capability: i32,
    /// Streaming multiprocessors of a GPU, cores of the CPU.
    pub processors: u32,
    /// 0.
    pub reserved: u32,
    /// Memory of a GPU in bytes; 0 for the CPU.
    pub memory_bytes: u64,
    /// Name, ended by a zero byte.
    pub name: [c_char; 128],
}

/// `PIXMIM_ABI_MAJOR << 16 | PIXMIM_ABI_MINOR` of the library. Refuse another major than the header's, and a smaller minor.
#[unsafe(no_mangle)]
pub extern "C" fn pixmim_abi_version() -> u32 {
    PIXMIM_ABI_MAJOR << 16 | PIXMIM_ABI_MINOR
}

/// Version of the library and commit it was built from. Static.
#[unsafe(no_mangle)]
pub extern "C" fn pixmim_version() -> *const c_char {
    static VERSION: OnceLock<CString> = OnceLock::new();
    VERSION.get_or_init(|| CString::new(pixmim_core::VERSION).unwrap_or_default()).as_ptr()
}

/// Why no GPU can be used, in a sentence; empty if one can. Static.
#[unsafe(no_mangle)]
pub extern "C" fn pixmim_no_gpu_reason() -> *const c_char {
    static REASON: OnceLock<CString> = OnceLock::new();
    let reason = || match probe::probe() {
        Ok(found) => match found.gpus.iter().find(|gpu| gpu.is_new_enough()) {
            Some(_) => String::new(),
            None => found
                .gpus
                .first()
                .map_or("the driver shows no GPU".into(), |gpu| gpu.too_old().to_string()),
        },
        Err(why) => why.to_string(),
    };
    REASON.get_or_init(|| CString::new(reason()).unwrap_or_default()).as_ptr()
}

/// Lists the devices: the CPU first, then the GPUs. Writes at most `capacity` elements at `devices` (which may be NULL if
/// `capacity` is 0) and their number in all to `*count`. Does not fail for want of a GPU.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_probe(
    devices: *mut pixmim_device_info,
    capacity: i32,
    count: *mut i32,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it leads to a number, which nobody else uses.
        let count = unsafe { pointee_mut("count", count) }?;
        let found = all_devices();
        let capacity = usize::try_from(capacity)
            .map_err(|_| Failure::invalid("capacity", "is negative"))?
            .min(found.len());
        if capacity > 0 {
            // SAFETY: the header asks of the caller that it leads to as many elements, which nobody else uses.
            let first = unsafe { pointee_mut("devices", devices) }?;
            expect_struct("devices", first.struct_size, size_of::<pixmim_device_info>())?;
            // SAFETY: as above; neither null nor misaligned.
            let into = unsafe { std::slice::from_raw_parts_mut(devices, capacity) };
            into.copy_from_slice(&found[..capacity]);
        }
        *count = found.len() as i32;
        Ok(())
    })
}

fn all_devices() -> Vec<pixmim_device_info> {
    let blank = |device, text: &str| {
        let mut name = [0; 128];
        let bytes = text.bytes().map(|byte| byte as c_char);
        name[..127].iter_mut().zip(bytes).for_each(|(into, byte)| *into = byte);
        pixmim_device_info {
            struct_size: size_of::<pixmim_device_info>() as u32,
            device,
            usable: 1,
            capability: 0,
            processors: 0,
            reserved: 0,
            memory_bytes: 0,
            name,
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    let cpu = pixmim_device_info { processors: cores, ..blank(PIXMIM_CPU, "CPU") };
    let gpus = probe::probe().map_or(&[][..], |found| &found.gpus);
    let gpus = (0..).zip(gpus).map(|(ordinal, gpu)| pixmim_device_info {
        usable: i32::from(gpu.is_new_enough()),
        capability: 10 * gpu.capability.0 as i32 + gpu.capability.1 as i32,
        processors: gpu.multiprocessors,
        memory_bytes: gpu.memory_bytes,
        ..blank(ordinal, &gpu.name)
    });
    std::iter::once(cpu).chain(gpus).collect()
}

/// Opens a device: PIXMIM_CPU or a CUDA ordinal. On a GPU in its primary context, as PyTorch, JAX and the CUDA runtime use.
/// Allocates, and loads the kernels.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_context_create(
    device: i32,
    options: *const pixmim_context_options,
    out: *mut *mut pixmim_context,
) -> pixmim_status {
    guard(|| {
        // SAFETY: the header asks of the caller that it leads to a pointer, which nobody else uses.
        let out = unsafe { pointee_mut("out", out) }?;
        let struct_size = size_of::<pixmim_context_options>() as u32;
        let mut chosen =
            pixmim_context_options { struct_size, threads: 0, bf16_products: 0, reserved: 0 };
        if !options.is_null() {
            // SAFETY: the header asks of the caller that it leads to options.
            chosen = *unsafe { pointee("options", options) }?;
            expect_struct("options", chosen.struct_size, size_of::<pixmim_context_options>())?;
        }
        *out = Box::into_raw(Box::new(pixmim_context::new(device, chosen)?));
        Ok(())
    })
}

/// Closes a device, once its work is done. NULL is let pass. Filters and models made with it may live on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pixmim_context_destroy(context: *mut pixmim_context) {
    guard(|| {
        if !context.is_null() && context.is_aligned() {
            // SAFETY: the header asks of the caller that it came from `pixmim_context_create` and is not used any more.
            drop(unsafe { Box::from_raw(context) });
        }
        Ok(())
    });
}
