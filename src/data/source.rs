//! Where samples come from: a folder tree of images, or the binary batches of CIFAR-10.

use std::path::Path;

use crate::data::Image;
use crate::data::cifar::{self, Cifar};
use crate::data::decode::Options;
use crate::data::folder::Folder;
use crate::{Error, Result};

/// An ordered set of images; a sample is known by its index, `0..len`. The order depends on names alone.
#[derive(Debug)]
pub enum Source {
    /// A folder tree of JPEG, PNG and WebP files.
    Folder(Folder),
    /// CIFAR-10, held in memory.
    Cifar(Cifar),
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
    /// Opens the folder `path`.
    ///
    /// If it, or its child `cifar-10-batches-bin`, holds `data_batch_1.bin` to `data_batch_5.bin` (or some of
    /// them), these are the samples; `test_batch.bin` is, if it stands alone.
    ///
    /// Otherwise the samples are the files below it, at most 32 folders deep, whose names end in `.jpg`, `.jpeg`,
    /// `.png` or `.webp` in any case, ordered by the bytes of their paths. The ending only selects (looking into a
    /// million files would take long): how a file is decoded is told by its content. Names that begin with a dot
    /// are passed over, links to files are followed, links to folders are not. Folders of the first level are
    /// the classes.
    ///
    /// # Errors
    /// [`Error::Data`] if there is nothing to read there, or something that may not be read.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let metadata = path.metadata().map_err(|e| {
            Error::data(path, format!("cannot be read ({e}); set data.path to a folder of images"))
        })?;
        if !metadata.is_dir() {
            return Err(Error::data(
                path,
                "is a file; set data.path to the folder that holds the images",
            ));
        }
        match cifar::batches(path)? {
            Some(batches) => Ok(Self::Cifar(Cifar::open(path, &batches)?)),
            None => Ok(Self::Folder(Folder::open(path, options)?)),
        }
    }

    /// The folder it was opened from.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder(folder) => folder.path(),
            Self::Cifar(cifar) => cifar.path(),
        }
    }

    /// Number of samples; at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a source is never empty")]
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Folder(folder) => folder.len(),
            Self::Cifar(cifar) => cifar.len(),
        }
    }

    /// Name of a sample: its path below the folder, or `data_batch_1.bin:123`.
    ///
    /// # Panics
    /// If `sample` is not below [`Source::len`].
    #[must_use]
    pub fn name(&self, sample: usize) -> String {
        match self {
            Self::Folder(folder) => folder.name(sample),
            Self::Cifar(cifar) => cifar.name(sample),
        }
    }

    /// Class of a sample, an index into [`Source::classes`]. A file that lies in the folder itself has none.
    ///
    /// # Panics
    /// If `sample` is not below [`Source::len`].
    #[must_use]
    pub fn label(&self, sample: usize) -> Option<usize> {
        match self {
            Self::Folder(folder) => folder.label(sample),
            Self::Cifar(cifar) => Some(cifar.label(sample)),
        }
    }

    /// Names of the classes.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        match self {
            Self::Folder(folder) => folder.classes(),
            Self::Cifar(cifar) => cifar.classes(),
        }
    }

    /// Whether [`Source::read`] costs no more than a copy.
    #[must_use]
    pub fn in_memory(&self) -> bool {
        matches!(self, Self::Cifar(_))
    }

    /// Reads and decodes a sample.
    ///
    /// # Errors
    /// [`BadImage`] if the file cannot be read or decoded.
    ///
    /// # Panics
    /// If `sample` is not below [`Source::len`].
    pub fn read(&self, sample: usize) -> Result<Image, BadImage> {
        match self {
            Self::Folder(folder) => folder.read(sample).map_err(|reason| BadImage {
                sample,
                name: self.name(sample),
                reason,
            }),
            Self::Cifar(cifar) => Ok(cifar.read(sample)),
        }
    }
}
