//! Compilations: run beside each other, and only those whose inputs changed.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, io, thread};

use crate::sources::Fnv;

/// A command that reads sources and makes one file.
pub(crate) struct Job {
    /// What is compiled, for messages.
    pub(crate) name: String,
    /// The file made. Beside it, `.stamp` holds the hash of its inputs, then what the compiler said.
    pub(crate) output: PathBuf,
    /// A hash of all that the result depends on beside the command's own words.
    pub(crate) inputs: u64,
    pub(crate) command: Command,
}

impl Job {
    fn stamp(&self) -> PathBuf {
        let mut stamp = self.output.clone().into_os_string();
        stamp.push(".stamp");
        stamp.into()
    }

    /// Hash of sources, headers, flags and compiler.
    fn key(&self) -> String {
        let mut key = Fnv(self.inputs);
        key.write(self.command.get_program().as_encoded_bytes());
        for word in self.command.get_args() {
            key.write(word.as_encoded_bytes());
        }
        format!("{:016x}", key.0)
    }

    /// What the compiler said when it made the output from these very inputs.
    fn said_before(&self) -> Option<String> {
        let stamp = fs::read_to_string(self.stamp()).ok()?;
        let (key, said) = stamp.split_once('\n')?;
        (key == self.key() && self.output.is_file()).then(|| said.to_owned())
    }

    fn run(&mut self) -> Result<String, String> {
        let output = self.command.output().map_err(|error| {
            let program = self.command.get_program().to_string_lossy();
            format!("cannot start {program} for {}: {error}", self.name)
        })?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if !output.status.success() {
            return Err(format!("{} does not compile ({})\n{said}", self.name, output.status));
        }
        let written = |result: io::Result<()>| {
            result.map_err(|error| format!("cannot write {}: {error}", self.stamp().display()))
        };
        written(fs::write(self.stamp(), format!("{}\n{said}", self.key())))?;
        Ok(said)
    }
}

/// How many compilers may run at once.
pub(crate) fn cores() -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).map_or(cores, |n| cores.min(n))
}

/// Runs the jobs whose output is missing or was made from other inputs. Returns what each compiler said, in the order of
/// `jobs`, now or when it made the output; or all that failed, with the compilers' own words.
pub(crate) fn run(jobs: Vec<Job>) -> Result<Vec<String>, String> {
    let mut said: Vec<_> = jobs.iter().map(|job| Ok(job.said_before())).collect();
    let stale = jobs.into_iter().zip(&mut said).filter(|(_, said)| matches!(said, Ok(None)));
    let queue = Mutex::new(stale);
    let next = || queue.lock().expect("no thread panics while it holds the queue").next();
    thread::scope(|scope| {
        for _ in 0..cores() {
            scope.spawn(|| {
                while let Some((mut job, said)) = next() {
                    *said = job.run().map(Some);
                }
            });
        }
    });
    let failed: Vec<_> = said.iter().filter_map(|said| said.as_ref().err().cloned()).collect();
    if failed.is_empty() {
        Ok(said.into_iter().flatten().flatten().collect())
    } else {
        Err(failed.join("\n"))
    }
}
