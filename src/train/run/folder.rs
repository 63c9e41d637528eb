//! The run folder: made, taken over, or refused.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{Options, Resume};
use crate::train::config::Config;
use crate::train::files::write_atomic;
use crate::{Error, Result};

/// What a run leaves in its folder, beside the event files. Nothing else is ever deleted.
const OURS: [&str; 9] = [
    "config.toml",
    "metrics.jsonl",
    "bad_images.jsonl",
    "notices.jsonl",
    "timeline.png",
    "report.html",
    "viz",
    "ckpt",
    "dump",
];
const EVENTS: &str = "events.out.tfevents.";

/// Makes `log.out` the folder of this run, with its `config.toml`.
pub(super) fn claim(config: &Config, options: &Options) -> Result<PathBuf> {
    let dir = config.log.out.clone();
    if dir.as_os_str().is_empty() {
        return Err(Error::invalid("log.out", "is empty; name a folder for the run"));
    }
    let holds = entries(&dir)?;
    let resumes = options.resume == Resume::Auto;
    if !holds.is_empty() && !resumes {
        let place = dir.display().to_string();
        if !options.overwrite {
            let why = "exists and is not empty; choose another --out, go on with --resume auto, or \
                       replace it with --overwrite";
            return Err(Error::config(place, why));
        }
        if !holds.iter().any(|name| name == "config.toml") {
            let why = "is not empty and holds no config.toml, so it is no run to overwrite; choose \
                       another --out";
            return Err(Error::config(place, why));
        }
        for name in holds.iter().filter(|name| OURS.contains(&&***name) || name.starts_with(EVENTS))
        {
            let path = dir.join(name);
            let removed =
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io("remove", path))?;
        }
    }
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    let text = config.to_toml()?;
    write_atomic(&dir.join("config.toml"), text.as_bytes())?;
    Ok(dir)
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
