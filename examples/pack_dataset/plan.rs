//! What is packed into which file, and what of it is there already.

use std::fs::{self, File, TryLockError};
use std::ops::Range;
use std::path::{Path, PathBuf};

use pixmim::data::shard::{EXTENSION, Set, Shard};
use pixmim::data::source::{BadImage, Source};
use pixmim::data::{decode, loader};
use pixmim::{Error, Result};

use crate::cli::Cli;

/// The list of photos that could not be read.
pub(crate) const BAD_IMAGES: &str = "bad_images.jsonl";

/// A set of shards that is to be made.
pub(crate) struct Plan {
    pub(crate) source: Source,
    pub(crate) out: PathBuf,
    pub(crate) set: Set,
    per_shard: usize,
    pub(crate) threads: usize,
    /// Photos that may be bad.
    pub(crate) max_bad: usize,
    /// Shards that are not there yet.
    pub(crate) missing: Vec<u32>,
    /// Photos that could not be read when the others were packed.
    pub(crate) bad: Vec<BadImage>,
    /// Held while it lives: keeps a second `pack_dataset` out of the folder.
    _lock: File,
}

impl Plan {
    pub(crate) fn new(cli: &Cli, out: &Path) -> Result<Self> {
        let options = decode::Options {
            exif_orientation: cli.exif_orientation,
            ..decode::Options::default()
        };
        let source = Source::open(&cli.data, &options)?;
        let shards = source.len().div_ceil(cli.images_per_shard as usize);
        /// Five digits of the names.
        const MAX_SHARDS: usize = 99_999;
        if shards > MAX_SHARDS {
            return Err(Error::config(
                "--images-per-shard",
                format!(
                    "would make {shards} shards, may make {MAX_SHARDS}; {} or more would do",
                    source.len().div_ceil(MAX_SHARDS)
                ),
            ));
        }
        // What else decides the bytes; side and interpolation are in the set themselves.
        let how = [cli.images_per_shard, cli.exif_orientation.into()].map(u32::to_le_bytes);
        let set = Set {
            shards: shards as u32,
            side: cli.side,
            interpolation: cli.interpolation,
            fingerprint: crc32c::crc32c_append(source.fingerprint(), how.as_flattened()),
            classes: source.classes().to_vec(),
        };

        fs::create_dir_all(out).map_err(Error::io("create", out))?;
        let lock = File::open(out).map_err(Error::io("read", out))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            // Where a file system knows no locks, there is none.
            return Err(Error::config("OUT", "another pack_dataset writes there; wait for it"));
        }
        let mut plan = Self {
            max_bad: loader::max_bad(source.len(), cli.max_bad_share),
            source,
            out: out.into(),
            set,
            per_shard: cli.images_per_shard as usize,
            threads: cli.threads(),
            missing: Vec::new(),
            bad: Vec::new(),
            _lock: lock,
        };
        plan.look_around()?;
        Ok(plan)
    }

    /// Finds the shards that are there, and refuses a folder that holds anything else.
    fn look_around(&mut self) -> Result<()> {
        let names: Vec<_> = (0..self.set.shards).map(|number| self.path(number)).collect();
        for entry in self.out.read_dir().map_err(Error::io("read", &self.out))? {
            let path = entry.map_err(Error::io("read", &self.out))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let whole = name.strip_suffix(".tmp").unwrap_or(&name);
            let is_ours = names.binary_search(&self.out.join(whole)).is_ok();
            if !is_ours && whole != BAD_IMAGES && !name.starts_with('.') {
                return Err(Error::config(
                    "OUT",
                    format!(
                        "{} is not part of what is packed; give an empty folder, or the arguments \
                         that this one was begun with",
                        path.display()
                    ),
                ));
            }
        }
        for (number, path) in (0..).zip(&names) {
            if !path.try_exists().map_err(Error::io("read", path))? {
                self.missing.push(number);
                continue;
            }
            let shard = Shard::open(path)?;
            if *shard.set() != self.set || shard.number() != number {
                return Err(Error::config(
                    "OUT",
                    format!(
                        "{} holds other photos, or was packed with other options; give another \
                         folder, or remove it",
                        path.display()
                    ),
                ));
            }
            self.bad.extend_from_slice(shard.skipped());
        }
        Ok(())
    }

    pub(crate) fn path(&self, number: u32) -> PathBuf {
        self.out.join(format!("images-{number:05}-of-{:05}.{EXTENSION}", self.set.shards))
    }

    /// The samples that a shard stands for.
    pub(crate) fn samples(&self, number: u32) -> Range<usize> {
        let first = number as usize * self.per_shard;
        first..(first + self.per_shard).min(self.source.len())
    }
}
