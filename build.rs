//! Records which source and compiler a binary was built from, for `doctor`, checkpoints and reports.

use std::process::Command;

fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}

fn main() {
    // A source archive has no repository: then the version alone identifies the build.
    let git =
        first_line("git", &["rev-parse", "--short=10", "HEAD"]).unwrap_or_else(|| "none".into());
    let rustc = std::env::var("RUSTC").ok().and_then(|rustc| first_line(&rustc, &["--version"]));
    println!("cargo::rustc-env=PIXMIM_GIT={git}");
    println!("cargo::rustc-env=PIXMIM_RUSTC={}", rustc.unwrap_or_else(|| "unknown".into()));
    // Grows with each commit and checkout; does not exist in a source archive, nor in a linked work tree.
    println!("cargo::rerun-if-changed=.git/logs/HEAD");
    println!("cargo::rerun-if-changed=build.rs");
}
