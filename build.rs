//! Compiles the kernels, and records which source and compiler a binary was built from, for `doctor`, checkpoints and
//! reports.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

#[path = "build/jobs.rs"]
mod jobs;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/ptxas.rs"]
mod ptxas;
#[path = "build/simt.rs"]
mod simt;
#[path = "build/sources.rs"]
mod sources;

use nvcc::Fatbins;
use sources::Source;

fn main() {
    provenance();
    // The messages of a compiler have many lines, and cargo takes one at a time.
    if let Err(message) = kernels() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}

fn provenance() {
    // A source archive has no repository: then the version alone identifies the build.
    let git =
        first_line("git", &["rev-parse", "--short=10", "HEAD"]).unwrap_or_else(|| "none".into());
    let rustc = env::var("RUSTC").ok().and_then(|rustc| first_line(&rustc, &["--version"]));
    println!("cargo::rustc-env=PIXMIM_GIT={git}");
    println!("cargo::rustc-env=PIXMIM_RUSTC={}", rustc.unwrap_or_else(|| "unknown".into()));
    // The log of HEAD grows with every commit; in a worktree it is not under ./.git. A path that is missing would
    // make cargo build everything anew each time.
    if let Some(log) = first_line("git", &["rev-parse", "--git-path", "logs/HEAD"])
        && Path::new(&log).exists()
    {
        println!("cargo::rerun-if-changed={log}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}

fn kernels() -> Result<(), String> {
    println!("cargo::rustc-check-cfg=cfg(pixmim_nvcc)");
    println!("cargo::rustc-check-cfg=cfg(pixmim_simt)");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: build with cargo")?);
    let sources = sources::files("kernels", "cu")?;
    let sources =
        sources.iter().map(|path| sources::read(path)).collect::<Result<Vec<_>, String>>()?;
    let mut names: Vec<_> = sources.iter().flat_map(|s| &s.kernels).map(|k| &k.name).collect();
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two kernels are called {}", pair[0]));
    }
    // docs.rs has neither compiler, and documents need no kernels.
    let has = |feature| env::var_os(feature).is_some() && env::var_os("DOCS_RS").is_none();
    if has("CARGO_FEATURE_SIMT") {
        if simt::is_supported() {
            simt::build(&sources, &out)?;
        } else {
            println!(
                "cargo::warning=feature `simt` is left out: the host executor of kernels runs on x86-64 Linux only"
            );
        }
    }
    let fatbins = if has("CARGO_FEATURE_CUDA") { fatbins(&sources, &out)? } else { None };
    let path = out.join("kernels.rs");
    fs::write(&path, embedded(&sources, fatbins.as_ref())?)
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Device code, or none with a warning where it may be missing.
fn fatbins(sources: &[Source], out: &Path) -> Result<Option<Fatbins>, String> {
    let is_required = nvcc::is_required();
    match nvcc::find() {
        Ok(nvcc) => {
            println!("cargo::rustc-cfg=pixmim_nvcc");
            nvcc::build(&nvcc, sources, out).map(Some)
        }
        Err(why) if is_required || env::var_os("PIXMIM_NVCC").is_some() => {
            Err(format!("{why}: run scripts/get-nvcc, or set PIXMIM_NVCC or CUDA_HOME"))
        }
        Err(why) => {
            println!(
                "cargo::warning={why}: built without GPU kernels, all else works on the CPU; for kernels run \
                 scripts/get-nvcc or set CUDA_HOME"
            );
            Ok(None)
        }
    }
}

/// The Rust source that src/cuda/kernels.rs includes.
fn embedded(sources: &[Source], fatbins: Option<&Fatbins>) -> Result<String, String> {
    let mut text = String::from(
        "/// Stem of each file of kernels, and its device code. Empty if nvcc was not there when this was built.\n\
         pub const FATBINS: &[(&str, &[u8])] = &[\n",
    );
    for (stem, path) in fatbins.iter().flat_map(|fatbins| &fatbins.files) {
        text += &format!("    ({stem:?}, fatbin!({path:?})),\n");
    }
    text += &format!(
        "];\n/// Registers, spills, shared memory and stack of each kernel, as in kernels/resources.txt. Empty without nvcc.\n\
         pub const RESOURCES: &str = {:?};\n/// Every kernel, whether or not it was compiled.\n\
         pub const KERNELS: &[Kernel] = &[\n",
        fatbins.map_or("", |fatbins| &fatbins.resources),
    );
    for source in sources {
        let hash = sources::hash(&source.path, Some("kernels/simt"))?;
        for sources::Kernel { name, hot } in &source.kernels {
            let file = &source.path;
            text += &format!(
                "    Kernel {{ name: {name:?}, file: {file:?}, hot: {hot}, hash: {hash:#x} }},\n"
            );
        }
    }
    Ok(text + "];\n")
}
