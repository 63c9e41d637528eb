//! Reads every byte of a set of shards again.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use pixmim::data::decode::Options;
use pixmim::data::shard::{EXTENSION, Shard};
use pixmim::data::source::Source;
use pixmim::{Error, Result};
use rayon::prelude::*;

use crate::program::say;
use crate::progress::Progress;

/// Exit code of a check that was stopped: nothing was found, but not all was read.
const EXIT_STOPPED: u8 = 130;

/// Tells of each damaged shard in `folder`; an error if there is one, or if the set is not whole.
pub(crate) fn verify(folder: &Path, threads: usize, stop: &AtomicBool) -> Result<ExitCode> {
    let mut files = Vec::new();
    for entry in folder.read_dir().map_err(Error::io("read", folder))? {
        files.push(entry.map_err(Error::io("read", folder))?.path());
    }
    files.retain(|file: &PathBuf| file.extension().is_some_and(|ending| ending == EXTENSION));
    files.sort();
    if files.is_empty() {
        return Err(Error::data(folder, "holds no shard; give the folder of a set"));
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::invalid("--threads", format!("cannot start: {error}")))?;
    let shards: Vec<_> = files.iter().map(|file| Shard::open(file)).collect();
    let images = shards.iter().flatten().map(Shard::len).sum();
    let mut progress = Progress::new(images);
    let (mut damaged, mut bad) = (0, 0);
    for shard in shards {
        let why = match &shard {
            Ok(shard) => pool.install(|| {
                let images = (0..shard.len()).into_par_iter();
                images.filter_map(|image| read(shard, image, stop).err()).collect()
            }),
            Err(error) => vec![error.to_string()],
        };
        if stop.load(Ordering::Relaxed) {
            progress.clear();
            say("stopped before all was read");
            return Ok(ExitCode::from(EXIT_STOPPED));
        }
        damaged += usize::from(!why.is_empty());
        bad += why.len();
        progress.add(shard.map_or(0, |shard| shard.len()), bad);
        for why in why {
            progress.say(&format!("damaged   {why}"));
        }
    }
    progress.clear();
    if damaged > 0 {
        return Err(Error::corrupt(
            folder,
            format!(
                "{damaged} of its {} shards are not what they were written as; remove these and pack \
                 again: only they are packed",
                files.len()
            ),
        ));
    }
    let source = Source::open(folder, &Options::default())?;
    say(&format!(
        "whole images={} shards={} images_per_s={:.0}",
        source.len(),
        files.len(),
        progress.images_per_s()
    ));
    Ok(ExitCode::SUCCESS)
}

fn read(shard: &Shard, image: usize, stop: &AtomicBool) -> Result<(), String> {
    if stop.load(Ordering::Relaxed) {
        return Ok(());
    }
    shard.read(image).map(drop).map_err(|why| format!("{}: {why}", shard.name(image)))
}
