//! What the probe says on machines that lack something. Each case builds a libcuda of a few lines with the system's C
//! compiler and probes it in a process of its own, which must end well: a panic, or an abort, fails the test.

#![cfg(all(feature = "cuda", target_os = "linux"))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use pixmim::cuda::probe::{NoGpu, cublaslt_symbols, driver_symbols, probe};

const CHILD: &str = "PIXMIM_TEST_PROBE";

/// A folder of libraries and a prefix with Python packages.
struct Machine {
    folder: tempfile::TempDir,
}

/// What a fake libcuda says.
struct Cuda {
    init: i32,
    version: i32,
    devices: i32,
    major: i32,
    lacks: &'static str,
}

const GOOD: Cuda = Cuda { init: 0, version: 13_000, devices: 1, major: 9, lacks: "" };

impl Machine {
    fn new() -> Self {
        let machine = Self { folder: tempfile::tempdir().unwrap() };
        std::fs::create_dir(machine.libraries()).unwrap();
        machine
    }

    fn libraries(&self) -> PathBuf {
        self.folder.path().join("lib64")
    }

    fn compile(&self, library: &Path, source: &str) {
        std::fs::create_dir_all(library.parent().unwrap()).unwrap();
        let file = self.folder.path().join("fake.c");
        std::fs::write(&file, source).unwrap();
        let name = library.file_name().unwrap().to_str().unwrap();
        let status = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()))
            .args(["-shared", "-fPIC", "-w", "-o"])
            .args([library, &file])
            .arg(format!("-Wl,-soname,{name}"))
            .status()
            .unwrap();
        assert!(status.success(), "{source}");
    }

    fn with_cuda(self, cuda: &Cuda) -> Self {
        let Cuda { init, version, devices, major, lacks } = cuda;
        let mut source = format!(
            "int cuInit(unsigned flags) {{ return {init}; }}
             int cuDriverGetVersion(int *version) {{ return *version = {version}, {init}; }}
             int cuDeviceGetCount(int *count) {{ return *count = {devices}, 0; }}
             int cuDeviceGetName(char *name, int bytes, int device) {{ return name[0] = 'X', name[1] = 0, 0; }}
             int cuDeviceTotalMem_v2(unsigned long *bytes, int device) {{ return *bytes = 3UL << 30, 0; }}
             int cuDeviceGetAttribute(int *value, int which, int device) {{ return *value = which == 75 ? {major} : 0, 0; }}"
        );
        for symbol in driver_symbols().filter(|symbol| !symbol.is_empty()) {
            if !source.contains(&format!("int {symbol}(")) {
                source.push_str(&format!("\nint {symbol}() {{ return 0; }}"));
            }
        }
        if !lacks.is_empty() {
            assert!(source.contains(&format!("int {lacks}(")), "{lacks} is not needed");
            source = source.replace(&format!("int {lacks}("), &format!("int no_{lacks}("));
        }
        self.compile(&self.libraries().join("libcuda.so.1"), &source);
        self
    }

    fn with_cublaslt(self, library: &Path, version: u32, lacks: &str) -> Self {
        let mut source = format!("unsigned long cublasLtGetVersion() {{ return {version}; }}");
        for symbol in cublaslt_symbols().filter(|s| *s != "cublasLtGetVersion" && *s != lacks) {
            source.push_str(&format!("\nint {symbol}() {{ return 0; }}"));
        }
        self.compile(&self.folder.path().join(library), &source);
        self
    }

    /// What a process of this test says that probes here, `NoGpu` as in its `Debug` and then its words.
    fn probe(&self, variables: &[(&str, &str)]) -> String {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "a_process_probes"])
            .env_clear()
            .env("LD_LIBRARY_PATH", self.libraries())
            .env("HOME", self.folder.path())
            .env("PATH", self.folder.path())
            .env(CHILD, "1")
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && !errors.contains("panicked"), "{text}{errors}");
        let (_, text) = text.split_once("<<").unwrap();
        text.split_once(">>").unwrap().0.to_owned()
    }
}

/// The process that the others start; in the test harness itself it probes this machine, whatever that has.
#[test]
fn a_process_probes() {
    let found = probe();
    assert_eq!(probe().err(), found.as_ref().err().cloned(), "the first answer stands");
    match found {
        Ok(found) => println!("<<{found:?}\n{found}>>"),
        Err(reason) => println!("<<{reason:?}\n{reason}>>"),
    }
}

/// The reason is `name`, and its words are one sentence that contains `cure`.
fn assert_reason(text: &str, name: &str, cure: &str) {
    let (reason, words) = text.split_once('\n').unwrap();
    assert!(reason.starts_with(name), "{text}");
    assert!(words.contains(cure), "{text}");
    assert!(!words.contains('\n') && !words.ends_with('.'), "{text}");
}

#[test]
fn without_a_library_there_is_no_driver() {
    assert_reason(&Machine::new().probe(&[]), "NoDriver", "install driver 580");
}

#[test]
fn a_stub_library_does_not_start() {
    let machine = Machine::new().with_cuda(&Cuda { init: 34, ..GOOD });
    assert_reason(&machine.probe(&[]), "InitFailed", "LD_LIBRARY_PATH");
    let machine = Machine::new().with_cuda(&Cuda { init: 803, ..GOOD });
    assert_reason(&machine.probe(&[]), "InitFailed", "restart the machine");
    let machine = Machine::new().with_cuda(&Cuda { init: 999, ..GOOD });
    assert_reason(&machine.probe(&[]), "InitFailed", "CUDA_ERROR_UNKNOWN");
}

#[test]
fn a_library_without_a_function_is_never_called() {
    for lacks in ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuGraphLaunch"] {
        let text = Machine::new().with_cuda(&Cuda { lacks, ..GOOD }).probe(&[]);
        assert_reason(
            &text,
            "MissingSymbol",
            &format!("libcuda has no {lacks}; install driver 580"),
        );
    }
}

#[test]
fn an_old_driver_is_named_by_its_version_even_if_it_lacks_functions() {
    let machine =
        Machine::new().with_cuda(&Cuda { version: 12_040, lacks: "cuFuncGetParamInfo", ..GOOD });
    let text = machine.probe(&[]);
    assert_reason(&text, "DriverTooOld { have: 12040", "supports CUDA 12.4, pixmim needs 13.0");
}

#[test]
fn a_driver_without_gpus_has_no_devices() {
    let machine = Machine::new().with_cuda(&Cuda { devices: 0, ..GOOD });
    assert_reason(&machine.probe(&[]), "NoDevices", "CUDA_VISIBLE_DEVICES");
    // What a real driver does when CUDA_VISIBLE_DEVICES is empty.
    let machine = Machine::new().with_cuda(&Cuda { init: 100, ..GOOD });
    assert_reason(&machine.probe(&[]), "NoDevices", "nvidia-smi");
}

#[test]
fn a_volta_is_too_old() {
    let machine = Machine::new().with_cuda(&Cuda { major: 7, ..GOOD });
    assert_reason(&machine.probe(&[]), "TooOld", "X has compute capability 7.0, pixmim needs 8.0");
}

#[test]
fn without_cublaslt_its_wheel_is_named() {
    let text = Machine::new().with_cuda(&GOOD).probe(&[]);
    // The machine that runs this may have one where every process finds it.
    let everywhere = ["/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"];
    if everywhere.iter().any(|folder| Path::new(folder).join("libcublasLt.so.13").exists()) {
        assert!(text.starts_with("NoKernels") || text.starts_with("Found"), "{text}");
    } else {
        assert_reason(&text, "NoCublasLt", "pip install \"nvidia-cublas==13.*\"");
    }
}

#[test]
fn a_cublaslt_that_is_old_or_lacks_a_function_is_refused() {
    let library = Path::new("lib64/libcublasLt.so.13");
    let text = Machine::new().with_cuda(&GOOD).with_cublaslt(library, 110_500, "").probe(&[]);
    assert_reason(&text, "NoCublasLt", "11.5 is too old");
    let machine = Machine::new().with_cuda(&GOOD);
    let text = machine.with_cublaslt(library, 130_100, "cublasLtMatmulAlgoCheck").probe(&[]);
    assert_reason(&text, "MissingSymbol", "libcublasLt has no cublasLtMatmulAlgoCheck; install");
}

#[test]
fn cublaslt_is_found_by_name_in_wheels_and_in_toolkits() {
    let cases = [
        ("lib64", "", ""),
        ("venv/lib/python3.12/site-packages/nvidia/cu13/lib", "VIRTUAL_ENV", "venv"),
        ("venv/lib/python3.9/site-packages/nvidia/cublas/lib", "VIRTUAL_ENV", "venv"),
        ("conda/lib/python3.13/site-packages/nvidia/cu13/lib", "CONDA_PREFIX", "conda"),
        ("conda/lib", "CONDA_PREFIX", "conda"),
        (".local/lib/python3.11/site-packages/nvidia/cu13/lib", "", ""),
        ("toolkit/lib64", "CUDA_HOME", "toolkit"),
    ];
    for (folder, variable, prefix) in cases {
        let library = Path::new(folder).join("libcublasLt.so.13");
        let machine = Machine::new().with_cuda(&GOOD).with_cublaslt(&library, 130_100, "");
        let prefix = machine.folder.path().join(prefix);
        let text = machine.probe(&[(
            if variable.is_empty() { "UNUSED" } else { variable },
            prefix.to_str().unwrap(),
        )]);
        // A build without kernels stops at its last check; one with kernels finds a GPU.
        assert!(text.starts_with("NoKernels") || text.starts_with("Found"), "{folder}: {text}");
        if text.starts_with("Found") {
            let expected = if folder == "lib64" {
                PathBuf::from("libcublasLt.so.13")
            } else {
                machine.folder.path().join(&library)
            };
            let expected = format!("cublasLt 13.1 from {}", expected.display());
            assert!(text.contains(&expected), "{folder}: {text}");
            assert!(text.contains("cuda:0: X, compute capability 9.0, 0 SMs, 3.0 GiB"), "{text}");
        }
    }
}

#[test]
fn the_environment_turns_gpus_off_before_anything_is_loaded() {
    let library = Path::new("lib64/libcublasLt.so.13");
    let machine = Machine::new().with_cuda(&GOOD).with_cublaslt(library, 130_100, "");
    assert_reason(&machine.probe(&[("PIXMIM_DEVICE", "cpu")]), "DisabledByEnv", "unset it");
}

#[test]
fn every_reason_is_one_sentence() {
    let reasons = [
        NoGpu::DisabledByEnv,
        NoGpu::NoDriver,
        NoGpu::MissingSymbol { library: "l", symbol: "s", cure: "install it" },
        NoGpu::DriverTooOld { have: 12_020, need: 13_000 },
        NoGpu::InitFailed { error: "e".into(), cure: "restart" },
        NoGpu::NoDevices,
        NoGpu::TooOld { name: "n".into(), have: (7, 5), need: (8, 0) },
        NoGpu::NoKernels,
        NoGpu::NoCublasLt { why: "w".into() },
    ];
    for reason in reasons {
        let words = reason.to_string();
        assert!(!words.ends_with('.') && !words.contains('\n') && !words.contains("  "), "{words}");
    }
}
