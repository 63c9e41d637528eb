//! `pretrain_vit` and `pack_dataset` as processes: what they say, what they leave, and what no signal, kill
//! or full disk may break.
#![cfg(all(feature = "train", unix))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod disks;
mod kills;
mod leaves;
mod memory;
mod packing;
mod program;
mod refusals;
mod signals;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};

use pixmim::rng::philox4x32_10;
use pixmim::train::StepRecord;
use pixmim::train::checkpoint::Checkpoint;
use pixmim::train::metrics;
use program::program;
use tempfile::TempDir;

/// A small network on the bundled photos: some milliseconds a step.
const SMALL: &str = r#"
[model]
image_size = 16
patch_size = 4
dim = 24
depth = 2
heads = 3
decoder_dim = 16
decoder_depth = 1
decoder_heads = 2

[optim]
global_batch = 8
micro_batch = 4

[runtime]
precision = "f32"
threads = 2

[log]
every = 1
picture_images = 2
"#;

const PHOTOS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/photos");

/// `command` in `folder`, without config in its environment.
fn clean(mut command: Command, folder: &Path) -> Command {
    command.current_dir(folder).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PIXMIM_") {
            command.env_remove(name);
        }
    }
    command
}

/// A folder to run in, with the small config.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("small.toml"), SMALL).unwrap();
    folder
}

/// The program with the small config in `folder`, and with `arguments`, which are split at spaces.
fn small(folder: &TempDir, arguments: &str) -> Command {
    let mut command = clean(Command::new(program()), folder.path());
    command.args(["--config", "small.toml"]).args(arguments.split_whitespace());
    command
}

/// Runs to the end; gives standard output and error.
fn finish(mut command: Command) -> (Output, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    (output, stdout, stderr)
}

/// The last lines of what may be hundreds.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].iter().map(|line| format!("{line}\n")).collect()
}

/// Runs what must succeed; gives the last line.
fn succeed(command: Command) -> String {
    let (output, stdout, stderr) = finish(command);
    assert_eq!(output.status.code(), Some(0), "{}{stderr}", tail(&stdout));
    stdout.lines().last().unwrap().to_owned()
}

/// Runs what must fail with `code`; gives the sentence after `error[code]: `.
fn fail(command: Command, code: i32) -> String {
    let (output, stdout, stderr) = finish(command);
    assert_eq!(output.status.code(), Some(code), "{}{stderr}", tail(&stdout));
    assert!(!stderr.contains("panicked"), "{stderr}");
    let last = stderr.lines().last().unwrap();
    last.strip_prefix(&format!("error[{code}]: ")).unwrap_or_else(|| panic!("{stderr}")).to_owned()
}

/// A program on its way, whose lines are read as they come.
struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout }
    }

    /// The next line; none at the end.
    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.stdout.read_line(&mut line).unwrap() > 0).then(|| line.trim_end().to_owned())
    }

    /// Reads on to a line that begins with `start`.
    fn wait_for(&mut self, start: &str) -> String {
        loop {
            let line = self.line().unwrap_or_else(|| panic!("no line begins with {start:?}"));
            if line.starts_with(start) {
                return line;
            }
        }
    }

    /// Sends a signal by its name. The shell's own `kill`, as it is everywhere.
    fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Waits for the end; gives what was still said, and the last line.
    fn end(mut self) -> (ExitStatus, String, String) {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let last = rest.lines().last().unwrap_or_default().to_owned();
        (self.child.wait().unwrap(), last, tail(&rest) + &stderr)
    }
}

impl Drop for Running {
    /// A failed test leaves no process behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Value of `key=` in a line of such pairs.
fn value<'a>(line: &'a str, key: &str) -> &'a str {
    let mut pairs = line.split(' ').filter_map(|pair| pair.split_once('='));
    pairs.find(|pair| pair.0 == key).unwrap_or_else(|| panic!("no {key} in {line:?}")).1
}

/// Number `index` of a sequence that differs by `key`, below `end`.
fn random(key: u32, index: u32, end: u64) -> u64 {
    (u64::from(philox4x32_10([index, 0, 0, 0], [key, 0])[0]) * end) >> 32
}

/// Steps of the checkpoints in a run, oldest first; each must be whole.
fn checkpoints(run: &Path) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(run.join("ckpt")) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    let named =
        paths.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("step-"));
    let mut steps: Vec<u64> =
        named.map(|path| Checkpoint::open(&path).unwrap().state.step).collect();
    steps.sort_unstable();
    steps
}

/// Bytes of weights, tables and moments of a checkpoint.
fn tensors(run: &Path, step: u64) -> [Vec<u8>; 2] {
    let checkpoint = run.join(format!("ckpt/step-{step:08}"));
    ["model.safetensors", "optim.safetensors"].map(|file| fs::read(checkpoint.join(file)).unwrap())
}

/// The logged steps without what is measured by the clock.
fn metrics_of(run: &Path) -> Vec<StepRecord> {
    let records = metrics::read::<StepRecord>(run).unwrap();
    let untimed =
        |r| StepRecord { images_per_s: 0.0, data_wait: 0.0, tflop_per_s: 0.0, mfu: 0.0, ..r };
    records.into_iter().map(untimed).collect()
}

/// Relative path, modification time and length of everything below a folder.
fn tree(folder: &Path) -> Vec<(PathBuf, std::time::SystemTime, u64)> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        let data = path.symlink_metadata().unwrap();
        if data.is_dir() {
            found.extend(tree(&path));
        }
        found.push((path, data.modified().unwrap(), data.len()));
    }
    found.sort();
    found
}
