//! libpixmim as programs in other languages link it.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The target folder that this program was built into.
pub(crate) fn target() -> PathBuf {
    // target/release/deps/program
    env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned()
}

/// Builds libpixmim.so and libpixmim.a, which `cargo test` does not by itself, and returns the folder they are in. Once for
/// each program; cargo's lock orders programs that run at once.
pub(crate) fn library() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        run(cargo().args(["build", "--release", "--package", "pixmim-capi"]));
        target().join("release")
    })
}

/// Cargo, on this workspace and into this program's target folder.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).env("CARGO_TARGET_DIR", target());
    cargo
}

/// A tool by the environment variable that names it (`CC`, `CXX`), or else by its usual name.
pub(crate) fn tool(variable: &str, usual: &str) -> Command {
    Command::new(env::var_os(variable).unwrap_or_else(|| usual.into()))
}

/// Runs a command to its end and returns what it printed; the test fails if the command does.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}
