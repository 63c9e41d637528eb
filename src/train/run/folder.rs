//! The run folder: made, taken over, or refused.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{Options, Resume};
use crate::train::config::Config;
use crate::train::files::write_atomic;
use crate::{Error, Result};

/// What a run leaves in its folder, beside `config.toml` and the event files. Nothing else is ever deleted.
const OURS: [&str; 9] = [
    "metrics.jsonl",
    "bad_images.jsonl",
    "notices.jsonl",
    "timeline.png",
    "report.html",
    "profile",
    "viz",
    "ckpt",
    "dump",
];
const CONFIG: &str = "config.toml";
const EVENTS: &str = "events.out.tfevents.";
/// Ending of a file on its way into place: a run that was killed may leave one.
const ASIDE: &str = ".tmp";

/// Refuses `log.out` unless it is free for this run, or a run to go on with or to replace. Gives what [`claim`] has to
/// remove. Changes nothing.
pub(super) fn judge(config: &Config, options: &Options) -> Result<Vec<PathBuf>> {
    let dir = &config.log.out;
    if dir.as_os_str().is_empty() {
        return Err(Error::invalid("log.out", "is empty; name a folder for the run"));
    }
    let holds = entries(dir)?;
    let place = || dir.display().to_string();
    if holds.iter().all(|name| name.strip_suffix(ASIDE) == Some(CONFIG)) {
        return Ok(Vec::new());
    }
    let resumes = match &options.resume {
        Resume::No => false,
        Resume::Auto => true,
        Resume::From(checkpoint) => is_below(checkpoint, dir),
    };
    if !resumes && !options.overwrite {
        let why = "exists and is not empty; choose another --out, go on with --resume auto, or \
                   replace it with --overwrite";
        return Err(Error::config(place(), why));
    }
    if !holds.iter().any(|name| name == CONFIG) {
        let why = "is not empty and holds no config.toml, so it is no run to go on with or to \
                   overwrite; choose another --out";
        return Err(Error::config(place(), why));
    }
    if resumes {
        return Ok(Vec::new());
    }
    let is_ours = |name: &&String| {
        OURS.contains(&name.strip_suffix(ASIDE).unwrap_or(name)) || name.starts_with(EVENTS)
    };
    Ok(holds.iter().filter(is_ours).map(|name| dir.join(name)).collect())
}

/// Makes `log.out` the folder of this run, with its `config.toml`, and without `stale`, what an earlier run left.
pub(super) fn claim(config: &Config, stale: &[PathBuf]) -> Result<()> {
    let dir = &config.log.out;
    for path in stale {
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.map_err(Error::io("remove", path))?;
    }
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    write_atomic(&dir.join(CONFIG), config.to_toml()?.as_bytes())
}

fn is_below(path: &Path, dir: &Path) -> bool {
    match (path.canonicalize(), dir.canonicalize()) {
        (Ok(path), Ok(dir)) => path.starts_with(dir),
        _ => false,
    }
}

/// Names in a folder; none if it does not exist.
fn entries(dir: &Path) -> Result<Vec<String>> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("use as a run folder", dir)(error)),
    };
    listing
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()
        .map_err(Error::io("list", dir))
}
