//! The kernels compiled for GPUs: finds nvcc, makes one fatbin of each file, keeps what ptxas says of each kernel.

use std::env::consts::EXE_SUFFIX;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, iter};

use crate::jobs::{self, Job};
use crate::ptxas;
use crate::sources::{self, Fnv, Source};

/// Machine code for each of these (A100, H100 and H200, B200), and PTX of the first for what comes later.
const ARCHS: [&str; 3] = ["80", "90a", "100"];
/// The first release that knows `sm_100`.
const OLDEST: (u32, u32) = (12, 8);

/// A CUDA compiler that starts and is new enough.
pub(crate) struct Nvcc {
    path: PathBuf,
    /// As `release 13.0, V13.0.88`.
    version: String,
}

/// What nvcc made.
pub(crate) struct Fatbins {
    /// Stem of the source and path of its fatbin.
    pub(crate) files: Vec<(String, PathBuf)>,
    /// The table of `kernels/resources.txt`.
    pub(crate) resources: String,
}

/// An environment variable, watched by cargo from the moment it is asked for.
fn variable(key: &str) -> Option<OsString> {
    println!("cargo::rerun-if-env-changed={key}");
    env::var_os(key).filter(|value| !value.is_empty())
}

/// Whether a build without kernels must fail.
pub(crate) fn is_required() -> bool {
    variable("PIXMIM_REQUIRE_CUDA").is_some_and(|value| value != "0")
}

/// The first usable nvcc, or why there is none.
pub(crate) fn find() -> Result<Nvcc, String> {
    if let Some(path) = variable("PIXMIM_NVCC") {
        return usable(path.into()).map_err(|why| format!("PIXMIM_NVCC is no use: {why}"));
    }
    let mut unusable = Vec::new();
    for path in places().filter(|path| path.is_file()) {
        match usable(path) {
            Ok(nvcc) => return Ok(nvcc),
            Err(why) => unusable.push(why),
        }
    }
    Err(if unusable.is_empty() { "no nvcc found".into() } else { unusable.join("; ") })
}

/// Where nvcc may be, best first. Lazy, so that cargo watches only the variables that mattered.
fn places() -> impl Iterator<Item = PathBuf> {
    let bin = |root: PathBuf| root.join("bin").join(format!("nvcc{EXE_SUFFIX}"));
    let named = iter::once_with(|| variable("NVCC")).flatten().map(PathBuf::from);
    let toolkits = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(variable);
    let path = iter::once_with(|| variable("PATH")).flatten().flat_map(|path| {
        let program = |folder: PathBuf| folder.join(format!("nvcc{EXE_SUFFIX}"));
        env::split_paths(&path).map(program).collect::<Vec<_>>()
    });
    // The wheels of pip, in a virtual environment or where scripts/get-nvcc puts them.
    let wheels = |packages: PathBuf| ["cu13", "cuda_nvcc"].map(|p| packages.join("nvidia").join(p));
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable);
    let environments = environments.flat_map(|root| site_packages(Path::new(&root)));
    let ours = iter::once_with(|| env::var_os("CARGO_MANIFEST_DIR")).flatten();
    let ours = ours.map(|root| Path::new(&root).join("target/cuda"));
    let usual = ["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from);
    named
        .chain(toolkits.map(PathBuf::from).map(bin))
        .chain(path)
        .chain(environments.chain(ours).flat_map(wheels).map(bin))
        .chain(usual.into_iter().map(bin))
}

fn site_packages(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root.join("lib")) else { return Vec::new() };
    let folders = entries.flatten().map(|entry| entry.path());
    let is_python = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"))
    };
    folders.filter(is_python).map(|path| path.join("site-packages")).collect()
}

fn usable(path: PathBuf) -> Result<Nvcc, String> {
    let shown = path.display();
    let output = Command::new(&path).arg("--version").output();
    let output = output.map_err(|error| format!("{shown} does not start: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().find_map(|line| Some(line.split_once("release ")?.1.to_owned()));
    let version = version.ok_or_else(|| format!("{shown} does not say its release"))?;
    let mut numbers = version.split(['.', ',']).map_while(|number| number.parse::<u32>().ok());
    let release = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if release < OLDEST {
        let (major, minor) = OLDEST;
        return Err(format!("{shown} is of CUDA {version}, older than {major}.{minor}"));
    }
    Ok(Nvcc { path, version: format!("release {version}") })
}

/// Compiles every file of kernels.
pub(crate) fn build(nvcc: &Nvcc, kernels: &[Source], out: &Path) -> Result<Fatbins, String> {
    let out = out.join("fatbin");
    fs::create_dir_all(&out).map_err(|error| format!("cannot make {}: {error}", out.display()))?;
    let only = variable("PIXMIM_CUDA_ARCHS").map(|archs| archs.to_string_lossy().into_owned());
    let mut targets = Vec::new();
    for arch in only.as_deref().map_or(ARCHS.to_vec(), |archs| archs.split(',').collect()) {
        targets.push(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if only.is_none() {
        targets.push(format!("-gencode=arch=compute_{0},code=compute_{0}", ARCHS[0]));
    }
    let job = |source: &Source| -> Result<Job, String> {
        let output = out.join(format!("{}.fatbin", source.stem()));
        let mut inputs = Fnv(sources::hash(&source.path, Some("kernels/simt"))?);
        inputs.write(nvcc.version.as_bytes());
        let mut command = Command::new(&nvcc.path);
        command.args(["-fatbin", "-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v,-warn-spills"]);
        // Every driver that this crate runs on can read it, and it is a sixth of the default.
        command.arg("--compress-mode=size");
        command.args(["-Ikernels", "-o"]).arg(&output).args(&targets).arg(&source.path);
        Ok(Job { name: source.path.display().to_string(), output, inputs: inputs.0, command })
    };
    let jobs = kernels.iter().map(job).collect::<Result<Vec<_>, _>>()?;
    let files = kernels.iter().zip(&jobs);
    let files = files.map(|(source, job)| (source.stem().to_owned(), job.output.clone())).collect();
    let said = jobs::run(jobs)?;
    for warning in said.iter().flat_map(|said| ptxas::warnings(said)) {
        println!("cargo::warning={warning}");
    }
    Ok(Fatbins { files, resources: table(&nvcc.version, kernels, &said)? })
}

/// The text of `kernels/resources.txt`: one line per kernel and architecture, sorted.
fn table(version: &str, sources: &[Source], said: &[String]) -> Result<String, String> {
    let mut lines = Vec::new();
    for (source, said) in sources.iter().zip(said) {
        let used = ptxas::parse(said);
        for kernel in &source.kernels {
            let before = lines.len();
            for usage in used.iter().filter(|usage| usage.kernel == kernel.name) {
                lines.push(format!("{usage}  {}\n", if kernel.hot { "hot" } else { "-" }));
            }
            if lines.len() == before {
                return Err(format!(
                    "ptxas says nothing of {} in {}",
                    kernel.name,
                    source.path.display()
                ));
            }
        }
    }
    lines.sort();
    Ok(format!(
        "# What each kernel uses, by nvcc {version}: registers of a thread, bytes of spills, of static shared memory and of\n\
         # stack. After a change that is meant: PIXMIM_BLESS=1 cargo test --release --test kernel_build\n\
         # kernel                         arch    registers spill-stores spill-loads shared  stack  hot\n{}",
        lines.concat()
    ))
}
