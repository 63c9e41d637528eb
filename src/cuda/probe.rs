//! Whether this process can use an NVIDIA GPU and, if not, why not and what to do.
//!
//! cudarc panics when a library or a symbol is missing, which ends a program built with `panic = "abort"`. So this probe
//! is the only gate to it: it runs once, and no call into cudarc is reachable before it has succeeded.

mod cublaslt;

use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::cuda::nvidia;

/// CUDA version a driver must support: 580 is the first of 13.0.
const DRIVER: i32 = 13_000;
/// Oldest compute capability the kernels are built for: Ampere.
const CAPABILITY: (u32, u32) = (8, 0);
/// What the probe itself calls before it knows the driver's version.
const FIRST_SYMBOLS: [&str; 2] = ["cuInit", "cuDriverGetVersion"];
/// What the probe calls afterwards.
const SYMBOLS: [&str; 5] = [
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceTotalMem_v2",
];

/// Why no NVIDIA GPU can be used here. Each message is one sentence and names the cure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoGpu {
    /// The user turned it off.
    #[error("PIXMIM_DEVICE=cpu turns GPUs off; unset it to use one")]
    DisabledByEnv,
    /// libcuda is not installed.
    #[error(
        "there is no NVIDIA driver: libcuda.so.1 was not found; install driver 580 or newer, or start the container \
         with --gpus all"
    )]
    NoDriver,
    /// A library lacks a function.
    #[error("{library} has no {symbol}; {cure}")]
    MissingSymbol {
        /// Library that was searched.
        library: &'static str,
        /// What it lacks.
        symbol: &'static str,
        /// What to install.
        cure: &'static str,
    },
    /// The driver is older than the kernels.
    #[error(
        "the NVIDIA driver supports CUDA {}, pixmim needs {}; install driver 580 or newer",
        cuda_version(*.have),
        cuda_version(*.need)
    )]
    DriverTooOld {
        /// CUDA version of the driver: 12040 is 12.4.
        have: i32,
        /// CUDA version needed.
        need: i32,
    },
    /// The driver is there and does not start.
    #[error("the NVIDIA driver does not start ({error}); {cure}")]
    InitFailed {
        /// The driver's name for it.
        error: String,
        /// What to try.
        cure: &'static str,
    },
    /// A driver, and no GPU.
    #[error("the NVIDIA driver shows no GPU; see what `nvidia-smi` and CUDA_VISIBLE_DEVICES say")]
    NoDevices,
    /// No GPU is new enough.
    #[error(
        "{name} has compute capability {}.{}, pixmim needs {}.{} (Ampere) or newer; use the CPU",
        .have.0, .have.1, .need.0, .need.1
    )]
    TooOld {
        /// The newest GPU found.
        name: String,
        /// Its compute capability.
        have: (u32, u32),
        /// The one needed.
        need: (u32, u32),
    },
    /// The library was built without nvcc. (A kernel without an image for a GPU is reported when that GPU is opened.)
    #[error("this build of pixmim has no CUDA kernels; run scripts/get-nvcc and build again")]
    NoKernels,
    /// cublasLt cannot be used.
    #[error("{why}; install it with `pip install \"nvidia-cublas==13.*\"`")]
    NoCublasLt {
        /// What was found.
        why: String,
    },
}

/// What the probe found.
#[derive(Debug)]
pub struct Found {
    /// CUDA version the driver supports: 13000 is 13.0.
    pub driver: i32,
    /// GPUs by ordinal, also those too old to be used.
    pub gpus: Vec<Gpu>,
    /// The matrix library.
    pub cublaslt: CublasLt,
}

/// A GPU, as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Product name: "NVIDIA H200".
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// The cublasLt in use.
#[derive(Debug)]
pub struct CublasLt {
    /// 130100 is 13.1.0.
    pub version: usize,
    /// File it came from, or a bare name if the system's search found it.
    pub path: PathBuf,
}

impl std::fmt::Display for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, capability: (major, minor), multiprocessors, .. } = self;
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        write!(f, "{name}, compute capability {major}.{minor}, {multiprocessors} SMs, {gib:.1} GiB")
    }
}

/// For `doctor`: the driver, cublasLt and each GPU, a line each.
impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let CublasLt { version, path } = &self.cublaslt;
        writeln!(f, "driver for CUDA {}", cuda_version(self.driver))?;
        write!(f, "cublasLt {}.{} from {}", version / 10_000, version / 100 % 100, path.display())?;
        self.gpus
            .iter()
            .enumerate()
            .try_for_each(|(ordinal, gpu)| write!(f, "\ncuda:{ordinal}: {gpu}"))
    }
}

impl Gpu {
    /// Whether the kernels can run on it.
    #[must_use]
    pub fn is_new_enough(&self) -> bool {
        self.capability >= CAPABILITY
    }

    /// Why it cannot be used.
    #[must_use]
    pub fn too_old(&self) -> NoGpu {
        NoGpu::TooOld { name: self.name.clone(), have: self.capability, need: CAPABILITY }
    }
}

/// Looks for a usable GPU; the first call decides for the process.
///
/// # Errors
/// The first reason that stands in the way.
pub fn probe() -> Result<&'static Found, NoGpu> {
    static FOUND: OnceLock<Result<Found, NoGpu>> = OnceLock::new();
    FOUND.get_or_init(look).as_ref().map_err(Clone::clone)
}

/// Every function of libcuda that is called, here and by the driver.
pub fn driver_symbols() -> impl Iterator<Item = &'static str> {
    FIRST_SYMBOLS.into_iter().chain(SYMBOLS).chain(nvidia::symbols())
}

/// Every function of libcublasLt that is called.
pub fn cublaslt_symbols() -> impl Iterator<Item = &'static str> {
    crate::cuda::cublaslt::SYMBOLS.into_iter()
}

fn look() -> Result<Found, NoGpu> {
    if std::env::var_os("PIXMIM_DEVICE").is_some_and(|device| device == "cpu") {
        return Err(NoGpu::DisabledByEnv);
    }
    let found = find()?;
    if crate::cuda::kernels::FATBINS.is_empty() {
        return Err(NoGpu::NoKernels);
    }
    Ok(found)
}

/// What there is, kernels apart.
pub(super) fn find() -> Result<Found, NoGpu> {
    let driver = start_driver()?;
    let gpus = gpus()?;
    let newest = gpus.iter().max_by_key(|gpu| gpu.capability).ok_or(NoGpu::NoDevices)?;
    if !newest.is_new_enough() {
        return Err(newest.too_old());
    }
    Ok(Found { driver, gpus, cublaslt: cublaslt::open()? })
}

/// Loads libcuda, starts it, and makes sure that it has all that will be called. Returns its CUDA version.
#[expect(unsafe_code, reason = "calls into libcuda")]
fn start_driver() -> Result<i32, NoGpu> {
    // SAFETY: opening libcuda runs its initialisers, which any program that uses a GPU does.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoGpu::NoDriver);
    }
    // SAFETY: as above; the line above found it, so this does not panic.
    let library = unsafe { sys::culib() };
    has_symbols(library, "libcuda", "install driver 580 or newer", FIRST_SYMBOLS.into_iter())?;

    // SAFETY: the library has cuInit, which takes flags that must be 0.
    init_result(unsafe { sys::cuInit(0) })?;
    let mut version = 0;
    // SAFETY: the library has cuDriverGetVersion, which writes one int.
    init_result(unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    if version < DRIVER {
        return Err(NoGpu::DriverTooOld { have: version, need: DRIVER });
    }
    has_symbols(library, "libcuda", "install driver 580 or newer", driver_symbols())?;
    Ok(version)
}

/// Whether the library has every symbol.
#[expect(unsafe_code, reason = "looks symbols up")]
fn has_symbols(
    library: &libloading::Library,
    name: &'static str,
    cure: &'static str,
    mut symbols: impl Iterator<Item = &'static str>,
) -> Result<(), NoGpu> {
    let lacks = |symbol: &&str| {
        // SAFETY: the symbol is looked up and never called through this type.
        let found = unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) };
        found.is_err()
    };
    match symbols.find(lacks) {
        Some(symbol) => Err(NoGpu::MissingSymbol { library: name, symbol, cure }),
        None => Ok(()),
    }
}

/// Judges a status without calling the driver, which may lack the function that would describe it.
fn init_result(status: sys::CUresult) -> Result<(), NoGpu> {
    use sys::CUresult as S;
    let cure = match status {
        S::CUDA_SUCCESS => return Ok(()),
        S::CUDA_ERROR_NO_DEVICE => return Err(NoGpu::NoDevices),
        S::CUDA_ERROR_STUB_LIBRARY => {
            "the libcuda found is the toolkit's stub: take its folder out of LD_LIBRARY_PATH"
        }
        S::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | S::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "library and kernel module are of different versions: restart the machine, or the container without \
             CUDA's compat folder"
        }
        _ => "see what `nvidia-smi` says",
    };
    Err(NoGpu::InitFailed { error: format!("{status:?}"), cure })
}

#[expect(unsafe_code, reason = "calls into libcuda")]
fn gpus() -> Result<Vec<Gpu>, NoGpu> {
    use sys::CUdevice_attribute_enum as A;
    let mut count = 0;
    // SAFETY: start_driver found the symbol and called cuInit; writes one int.
    init_result(unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    let describe = |ordinal| {
        let mut device = 0;
        // SAFETY: as above.
        init_result(unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: as above; `device` came from cuDeviceGet.
            init_result(unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let mut name: [c_char; 256] = [0; 256];
        // SAFETY: as above; at most the 255 bytes given are written, so the last one stays 0.
        init_result(unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 255 as c_int, device) })?;
        let mut memory: usize = 0;
        // SAFETY: as above; writes one size_t.
        init_result(unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory, device) })?;
        // SAFETY: the last byte of `name` is 0.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        Ok(Gpu {
            name: name.to_string_lossy().into_owned(),
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            memory_bytes: memory as u64,
            multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        })
    };
    (0..count).map(describe).collect()
}

/// "13.0" for 13000.
fn cuda_version(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
