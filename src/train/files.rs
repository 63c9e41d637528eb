//! Files that survive a kill and a full disk: replaced as a whole, or appended to record by record.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Writes `bytes` beside `path`, syncs them, and renames them into place: a reader, and a run that is killed at any
/// moment, sees the old file or the new one.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".tmp");
    let aside = PathBuf::from(aside);
    File::create(&aside)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&aside, path))
        .map_err(|source| {
            // The first failure is the one to report; what is left aside is only litter.
            let _ = fs::remove_file(&aside);
            Error::io("write", path)(source)
        })
}

/// A file that only grows, by whole records.
#[derive(Debug)]
pub(crate) struct Appender {
    file: File,
    path: PathBuf,
    /// Bytes of whole records.
    length: u64,
}

impl Appender {
    /// A file that did not exist before.
    pub(crate) fn create_new(path: PathBuf) -> std::io::Result<Self> {
        let file = OpenOptions::new().append(true).create_new(true).open(&path)?;
        Ok(Self { file, path, length: 0 })
    }

    /// The first `length` bytes of a file; what it holds after them is cut off.
    pub(crate) fn open_at(path: PathBuf, length: u64) -> Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|file| file.set_len(length).map(|()| file))
            .map_err(Error::io("write", &path))?;
        Ok(Self { file, path, length })
    }

    /// Adds `record` in one write, so that other processes see it at once; after a failure the file ends where it did.
    pub(crate) fn append(&mut self, record: &[u8]) -> Result<()> {
        if let Err(error) = self.file.write_all(record) {
            // A full disk may have taken half of it: the next record must not be glued to that half.
            let _ = self.file.set_len(self.length);
            return Err(Error::io("write", &self.path)(error));
        }
        self.length += record.len() as u64;
        Ok(())
    }

    /// Waits until all records are on the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("write", &self.path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_a_failure_leaves_nothing_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write_atomic(&path, b"old and long").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");

        let folder = dir.path().join("folder");
        fs::create_dir_all(folder.join("full")).unwrap();
        let error = write_atomic(&folder, b"x").unwrap_err();
        assert!(error.to_string().starts_with("cannot write"), "{error}");
        let left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}
