//! Where samples come from: a folder tree of images, `.tar` files, packed shards, or the binary batches of CIFAR-10.

use std::io;
use std::path::{Path, PathBuf};

use crate::data::Image;
use crate::data::cifar::{self, Cifar};
use crate::data::decode::Options;
use crate::data::folder::Folder;
use crate::data::shard::{self, Shards};
use crate::data::tar::Tar;
use crate::{Error, Result};

/// An ordered set of images; a sample is known by its index, `0..len`. The order depends on names alone.
#[derive(Debug)]
pub enum Source {
    /// A folder tree of JPEG, PNG and WebP files.
    Folder(Folder),
    /// CIFAR-10, held in memory.
    Cifar(Cifar),
    /// Packed shards, mapped into memory.
    Shards(Shards),
    /// Images in `.tar` files.
    Tar(Tar),
}

/// A sample that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BadImage {
    /// Its index.
    pub sample: usize,
    /// Its name, as [`Source::name`] gives it.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl Source {
    /// Opens `path`: a folder, or one `.tar` file.
    ///
    /// What a folder is, is told by what lies directly in it:
    ///
    /// 1. `data_batch_1.bin` to `data_batch_5.bin`, or some of them, here or in the child `cifar-10-batches-bin`: these
    ///    are the samples; `test_batch.bin` is, if it stands alone.
    /// 2. `*.shard`: packed shards, all of one set ([`shard`]).
    /// 3. `*.tar`: the images in them, as `WebDataset` has them. Compressed ones are not read.
    /// 4. Otherwise the samples are the files below it, at most 32 folders deep, whose names end in `.jpg`, `.jpeg`,
    ///    `.png` or `.webp` in any case, ordered by the bytes of their paths. The ending only selects (looking into a
    ///    million files would take long): how a file is decoded is told by its content. Links to files are followed,
    ///    links to folders are not. Folders of the first level are the classes.
    ///
    /// A folder that is two of the first three, or 2 or 3 with images beside or below, is refused. Names that begin
    /// with a dot are passed over. Shards and tars are ordered by the bytes of their names, samples by their place.
    ///
    /// # Errors
    /// [`Error::Data`] if there is nothing to read there, or something that may not be read; [`Error::Corrupt`] for a
    /// damaged shard.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let metadata = path.metadata().map_err(|e| {
            Error::data(path, format!("cannot be read ({e}); set data.path to a folder of images"))
        })?;
        if !metadata.is_dir() {
            return match Kind::of(path) {
                Some(Kind::Tar) => Ok(Self::Tar(Tar::open(path, vec![path.into()], options)?)),
                Some(Kind::Shard) => {
                    Err(Error::data(path, "is a shard; set data.path to the folder that holds all"))
                }
                Some(Kind::Compressed) => Err(Error::data(path, COMPRESSED)),
                None => Err(Error::data(
                    path,
                    "is a file; set data.path to the folder that holds the images, or to a .tar",
                )),
            };
        }
        let [shards, tars, compressed] = listed(path)?;
        let both = |one: &str, other: &str| {
            Error::data(path, format!("holds {one} and {other}; give each a folder of its own"))
        };
        let images_too = |one: &str| match Folder::open(path, options) {
            Ok(_) => Err(both(one, "images")),
            Err(_) => Ok(()),
        };
        match (cifar::batches(path)?, shards.is_empty(), tars.is_empty()) {
            (Some(batches), true, true) => Ok(Self::Cifar(Cifar::open(path, &batches)?)),
            (Some(_), false, _) => Err(both("CIFAR-10 batches", "shards")),
            (Some(_), _, false) => Err(both("CIFAR-10 batches", ".tar files")),
            (None, false, false) => Err(both("shards", ".tar files")),
            (None, false, true) => {
                images_too("shards")?;
                Ok(Self::Shards(Shards::open(path, &shards)?))
            }
            (None, true, false) => {
                images_too(".tar files")?;
                Ok(Self::Tar(Tar::open(path, tars, options)?))
            }
            (None, true, true) => match (Folder::open(path, options), compressed.first()) {
                (Ok(folder), _) => Ok(Self::Folder(folder)),
                (Err(_), Some(file)) => Err(Error::data(file, COMPRESSED)),
                (Err(error), None) => Err(error),
            },
        }
    }

    /// The folder or file it was opened from.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder(folder) => folder.path(),
            Self::Cifar(cifar) => cifar.path(),
            Self::Shards(shards) => shards.path(),
            Self::Tar(tar) => tar.path(),
        }
    }

    /// Number of samples; at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a source is never empty")]
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Folder(folder) => folder.len(),
            Self::Cifar(cifar) => cifar.len(),
            Self::Shards(shards) => shards.len(),
            Self::Tar(tar) => tar.len(),
        }
    }

    /// Name of a sample: its path below the folder, `data_batch_1.bin:123`, `a.tar:path/within`, or what it was named
    /// when it was packed.
    ///
    /// # Panics
    /// If `sample` is not below [`Source::len`].
    #[must_use]
    pub fn name(&self, sample: usize) -> String {
        match self {
            Self::Folder(folder) => folder.name(sample),
            Self::Cifar(cifar) => cifar.name(sample),
            Self::Shards(shards) => shards.name(sample),
            Self::Tar(tar) => tar.name(sample),
        }
    }

    /// Class of a sample, an index into [`Source::classes`]. A file that lies in the folder itself has none, nor has a
    /// member of a tar without `.cls`.
    ///
    /// # Panics
    /// If `sample` is not below [`Source::len`].
    #[must_use]
    pub fn label(&self, sample: usize) -> Option<usize> {
        match self {
            Self::Folder(folder) => folder.label(sample),
            Self::Cifar(cifar) => Some(cifar.label(sample)),
            Self::Shards(shards) => shards.label(sample),
            Self::Tar(tar) => tar.label(sample),
        }
    }

    /// Names of the classes.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        match self {
            Self::Folder(folder) => folder.classes(),
            Self::Cifar(cifar) => cifar.classes(),
            Self::Shards(shards) => shards.classes(),
            Self::Tar(tar) => tar.classes(),
        }
    }

    /// Whether [`Source::read`] costs no more than a copy.
    #[must_use]
    pub fn in_memory(&self) -> bool {
        matches!(self, Self::Cifar(_) | Self::Shards(_))
    }

    /// What packed shards were resized to, if the samples are in shards.
    #[must_use]
    pub fn packed(&self) -> Option<&shard::Set> {
        match self {
            Self::Shards(shards) => Some(shards.set()),
            _ => None,
        }
    }

    /// Reads and decodes a sample.
    ///
    /// # Errors
    /// [`BadImage`] if the file cannot be read or decoded.
    ///
    /// # Panics
    /// If `sample` is not below [`Source::len`].
    pub fn read(&self, sample: usize) -> Result<Image, BadImage> {
        let image = match self {
            Self::Folder(folder) => folder.read(sample),
            Self::Cifar(cifar) => Ok(cifar.read(sample)),
            Self::Shards(shards) => shards.read(sample),
            Self::Tar(tar) => tar.read(sample),
        };
        image.map_err(|reason| BadImage { sample, name: self.name(sample), reason })
    }

    /// A number that other data most likely do not have: of names, labels, and the size of each file or the checksum of
    /// what is in memory. Where the data lie does not count. Asks for the size of each image of a folder.
    #[must_use]
    pub fn fingerprint(&self) -> u32 {
        let mut sum = 0;
        for class in self.classes() {
            sum = crc32c::crc32c_append(sum, class.as_bytes());
            sum = crc32c::crc32c_append(sum, &[0]);
        }
        for sample in 0..self.len() {
            let content = match self {
                Self::Folder(folder) => folder.size(sample),
                Self::Cifar(cifar) => cifar.crc(sample).into(),
                Self::Shards(shards) => shards.crc(sample).into(),
                Self::Tar(tar) => tar.size(sample),
            };
            let label = self.label(sample).map_or(u64::MAX, |label| label as u64);
            sum = crc32c::crc32c_append(sum, self.name(sample).as_bytes());
            sum = crc32c::crc32c_append(sum, &[0]);
            sum = crc32c::crc32c_append(sum, &label.to_le_bytes());
            sum = crc32c::crc32c_append(sum, &content.to_le_bytes());
        }
        sum
    }
}

/// Why a file of the data could not be read, and the cure.
pub(super) fn unreadable(path: &Path, error: &io::Error) -> Error {
    /// `EMFILE` of Linux, macOS and the BSDs.
    const TOO_MANY_OPEN: i32 = 24;
    let cure = match error.raw_os_error() {
        Some(TOO_MANY_OPEN) if cfg!(unix) => {
            "each shard stays open: raise the limit with ulimit -n"
        }
        _ => "make it readable",
    };
    Error::data(path, format!("cannot be read ({error}); {cure}"))
}

const COMPRESSED: &str =
    "is a compressed archive and cannot be read in place; decompress it to a .tar";

/// What a file is, by the ending of its name.
#[derive(Clone, Copy)]
enum Kind {
    Shard,
    Tar,
    Compressed,
}

impl Kind {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_lowercase();
        let compressed = [".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".zip"];
        match name.rsplit_once('.')?.1 {
            shard::EXTENSION => Some(Self::Shard),
            "tar" => Some(Self::Tar),
            _ if compressed.iter().any(|ending| name.ends_with(ending)) => Some(Self::Compressed),
            _ => None,
        }
    }
}

/// The files of each [`Kind`] that lie in a folder, ordered by their names.
fn listed(folder: &Path) -> Result<[Vec<PathBuf>; 3]> {
    let failed =
        |e: io::Error| Error::data(folder, format!("cannot be listed ({e}); make it readable"));
    let mut found = [const { Vec::new() }; 3];
    for entry in folder.read_dir().map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if let Some(kind) = Kind::of(&path).filter(|_| !hidden && path.is_file()) {
            found[kind as usize].push(path);
        }
    }
    for files in &mut found {
        files.sort_unstable_by(|a, b| {
            a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes())
        });
    }
    Ok(found)
}
