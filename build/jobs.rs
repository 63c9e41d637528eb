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

    /// Hash of sources, headers, flags and compiler, but not of where the output goes.
    fn key(&self) -> String {
        let mut key = Fnv(self.inputs);
        key.write(self.command.get_program().as_encoded_bytes());
        for word in self.command.get_args().filter(|&word| word != self.output.as_os_str()) {
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

    fn run(&mut self, cache: Option<&Cache>) -> Result<String, String> {
        if let Some(said) = cache.and_then(|cache| cache.take(self)) {
            self.write_stamp(&said)?;
            return Ok(said);
        }
        let said = self.compile()?;
        self.write_stamp(&said)?;
        if let Some(cache) = cache {
            cache.keep(self).map_err(|error| {
                format!("cannot write {} (PIXMIM_KERNEL_CACHE): {error}", cache.0.display())
            })?;
        }
        Ok(said)
    }

    fn compile(&mut self) -> Result<String, String> {
        let output = self.command.output().map_err(|error| {
            let program = self.command.get_program().to_string_lossy();
            format!("cannot start {program} for {}: {error}", self.name)
        })?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if !output.status.success() {
            return Err(format!("{} does not compile ({})\n{said}", self.name, output.status));
        }
        Ok(said)
    }

    fn write_stamp(&self, said: &str) -> Result<(), String> {
        fs::write(self.stamp(), format!("{}\n{said}", self.key()))
            .map_err(|error| format!("cannot write {}: {error}", self.stamp().display()))
    }
}

/// A folder that keeps what was compiled, by the hash of all that it depends on: cargo builds this crate once for each set
/// of features and for clippy, each in a folder of its own.
struct Cache(PathBuf);

impl Cache {
    fn from_env() -> Option<Self> {
        println!("cargo::rerun-if-env-changed=PIXMIM_KERNEL_CACHE");
        let folder = env::var_os("PIXMIM_KERNEL_CACHE").filter(|folder| !folder.is_empty())?;
        Some(Self(folder.into()))
    }

    /// Where the output of a job is, and its stamp.
    fn paths(&self, job: &Job) -> [PathBuf; 2] {
        ["", ".stamp"].map(|suffix| self.0.join(job.key() + suffix))
    }

    /// Puts an earlier result in the output's place. What cannot be read is as good as not there.
    fn take(&self, job: &Job) -> Option<String> {
        let [output, stamp] = self.paths(job);
        let stamp = fs::read_to_string(stamp).ok()?;
        let (_, said) = stamp.split_once('\n')?;
        fs::copy(output, &job.output).ok()?;
        Some(said.to_owned())
    }

    /// Keeps the output, then the stamp that vouches for it; each appears whole, as others may be looking.
    fn keep(&self, job: &Job) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        for (from, to) in [job.output.clone(), job.stamp()].iter().zip(self.paths(job)) {
            let part = to.with_extension(format!("{}.part", std::process::id()));
            fs::copy(from, &part)?;
            fs::rename(part, to)?;
        }
        Ok(())
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
    let cache = Cache::from_env();
    let next = || queue.lock().expect("no thread panics while it holds the queue").next();
    thread::scope(|scope| {
        for _ in 0..cores() {
            scope.spawn(|| {
                while let Some((mut job, said)) = next() {
                    *said = job.run(cache.as_ref()).map(Some);
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
