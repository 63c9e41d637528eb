//! Compiles the kernels, and records which source and compiler a binary was built from, for `doctor`, checkpoints and
//! reports.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "build/jobs.rs"]
mod jobs;
#[path = "build/simt.rs"]
mod simt;
#[path = "build/sources.rs"]
mod sources;

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
    if env::var_os("DOCS_RS").is_some() {
        return Ok(());
    }
    if env::var_os("CARGO_FEATURE_SIMT").is_some() {
        if simt::is_supported() {
            simt::build(&sources, &out)?;
        } else {
            println!(
                "cargo::warning=the host executor of kernels (feature `simt`) runs on x86-64 Linux only: left out"
            );
        }
    }
    Ok(())
}
