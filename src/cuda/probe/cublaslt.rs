//! Finds cublasLt: on the system's search path, in the wheels of a Python environment, or in a CUDA toolkit.
//!
//! NVIDIA's wheels put the library where no loader looks. Opened once by its path and kept open, it is found by name from
//! then on, so a virtual environment with `nvidia-cublas` is enough and `LD_LIBRARY_PATH` need not be set.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use cudarc::cublaslt::sys;
use libloading::Library;

use super::{CublasLt, NoGpu, cublaslt_symbols, has_symbols};

const NAME: &str = "libcublasLt.so.13";
/// Oldest version whose interface is the one called here.
const OLDEST: usize = 120_000;
const CURE: &str = "install `nvidia-cublas==13.*` with pip";

/// Loads the library for the rest of the process and makes sure that it has all that will be called.
#[expect(unsafe_code, reason = "opens a library and calls into it")]
pub(super) fn open() -> Result<CublasLt, NoGpu> {
    let preloaded = preload();
    // SAFETY: opening cublasLt runs its initialisers, which start no work.
    if !unsafe { sys::is_culib_present() } {
        let why = match preloaded {
            Some((_, path)) => format!("{} cannot be found by name", path.display()),
            None => format!("{NAME} was not found"),
        };
        return Err(NoGpu::NoCublasLt { why });
    }
    // SAFETY: as above; the check above found it, so this does not panic.
    let library = unsafe { sys::culib() };
    has_symbols(library, "libcublasLt", CURE, cublaslt_symbols())?;
    // SAFETY: the library has the function, which takes nothing and needs no GPU.
    let version = unsafe { sys::cublasLtGetVersion() };
    if version < OLDEST {
        let (major, minor) = (version / 10_000, version / 100 % 100);
        let why = format!("cublasLt {major}.{minor} is too old: pixmim needs 13, and takes 12");
        return Err(NoGpu::NoCublasLt { why });
    }
    // A libcublasLt.so on the search path goes before the one opened here.
    let path = match preloaded {
        Some((opened, path)) if address(opened) == address(library) => path,
        _ => PathBuf::from("libcublasLt.so"),
    };
    Ok(CublasLt { version, path })
}

/// Opens the first libcublasLt.so.13 there is and keeps it open.
#[expect(unsafe_code, reason = "opens a library")]
fn preload() -> Option<(&'static Library, PathBuf)> {
    static OPENED: OnceLock<Option<(Library, PathBuf)>> = OnceLock::new();
    let open = |path: PathBuf| {
        // SAFETY: opening cublasLt runs its initialisers, which start no work.
        unsafe { Library::new(&path) }.ok().map(|library| (library, path))
    };
    let opened = OPENED
        .get_or_init(|| std::iter::once(PathBuf::from(NAME)).chain(candidates()).find_map(open));
    opened.as_ref().map(|(library, path)| (library, path.clone()))
}

/// Where the library's code is, to tell two copies apart.
#[expect(unsafe_code, reason = "looks a symbol up")]
fn address(library: &Library) -> Option<usize> {
    // SAFETY: the symbol is looked up and never called through this type.
    let symbol = unsafe { library.get::<unsafe extern "C" fn()>(b"cublasLtGetVersion") };
    symbol.ok().map(|function| *function as usize)
}

/// Files that may be the library, nearest first. Python is asked last: starting it takes a while.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let prefixes = [
        variable("VIRTUAL_ENV"),
        variable("CONDA_PREFIX"),
        variable("HOME").map(|home| home.join(".local")),
        Some("/usr/local".into()),
        Some("/usr".into()),
    ];
    let toolkits =
        [variable("CUDA_HOME"), variable("CUDA_PATH"), Some("/usr/local/cuda".into())].into_iter();
    let conda = variable("CONDA_PREFIX").map(|prefix| prefix.join("lib"));
    prefixes
        .into_iter()
        .flatten()
        .flat_map(|prefix| packages(&prefix))
        .flat_map(|packages| wheels(&packages))
        .chain(conda)
        .chain(toolkits.flatten().map(|toolkit| toolkit.join("lib64")))
        .chain(std::iter::once_with(python_packages).flatten().flat_map(|p| wheels(&p)))
        .map(|folder| folder.join(NAME))
        .filter(|file| file.is_file())
}

/// `lib/python3*/{site,dist}-packages` of a prefix, newest Python first.
fn packages(prefix: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(prefix.join("lib")) else { return Vec::new() };
    let mut pythons: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let minor = entry.file_name().to_str()?.strip_prefix("python3")?.to_owned();
            // Debian keeps the packages of all its Pythons in plain `python3`.
            let minor = minor.strip_prefix('.').and_then(|minor| minor.parse().ok()).unwrap_or(0);
            Some((minor, entry.path()))
        })
        .collect();
    pythons.sort_by(|a, b| b.cmp(a));
    pythons
        .into_iter()
        .flat_map(|(_, python)| ["site-packages", "dist-packages"].map(|name| python.join(name)))
        .collect()
}

/// Where NVIDIA's wheels put libraries, of CUDA 13 and before.
fn wheels(packages: &Path) -> [PathBuf; 2] {
    ["nvidia/cu13/lib", "nvidia/cublas/lib"].map(|folder| packages.join(folder))
}

fn python_packages() -> Vec<PathBuf> {
    let script =
        "import sysconfig as s; print(s.get_path('purelib')); print(s.get_path('platlib'))";
    let output = Command::new("python3").args(["-c", script]).stdin(Stdio::null()).output();
    let text = output.ok().and_then(|output| String::from_utf8(output.stdout).ok());
    text.unwrap_or_default().lines().map(PathBuf::from).collect()
}
