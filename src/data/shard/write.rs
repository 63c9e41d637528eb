//! Writing a shard: pixels as they come, then the index, then the header; aside, until all of it is on the disk.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::{ALIGN, Entry, HEADER_BYTES, Header, MAX_IMAGES, MAX_INDEX_BYTES, NO_LABEL, Set};
use crate::data::Image;
use crate::data::source::BadImage;
use crate::{Error, Result};

/// A shard that is being written, as `<name>.tmp`. Dropped before [`ShardWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    aside: PathBuf,
    file: BufWriter<File>,
    /// It has its name.
    finished: bool,
    set: Set,
    number: u32,
    first_sample: u64,
    /// Where the next image goes.
    offset: u64,
    entries: Vec<Entry>,
    skipped: Vec<BadImage>,
}

impl ShardWriter {
    /// Begins shard `number` of `set`, which stands for the samples of the source from `first_sample` on.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn create(path: &Path, set: Set, number: u32, first_sample: u64) -> Result<Self> {
        const BUFFER_BYTES: usize = 1 << 20;
        let mut aside = path.as_os_str().to_owned();
        aside.push(".tmp");
        let aside = PathBuf::from(aside);
        let file = File::create(&aside).map_err(Error::io("write", &aside))?;
        let mut writer = Self {
            path: path.into(),
            aside,
            file: BufWriter::with_capacity(BUFFER_BYTES, file),
            finished: false,
            set,
            number,
            first_sample,
            offset: HEADER_BYTES as u64,
            entries: Vec::new(),
            skipped: Vec::new(),
        };
        // Its place; what belongs there is known at the end.
        writer.write(&[0; HEADER_BYTES])?;
        Ok(writer)
    }

    /// Adds an image.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an image that a shard cannot hold, [`Error::Io`] if it cannot be written.
    pub fn push(&mut self, name: &str, label: Option<usize>, image: &Image) -> Result<()> {
        let refused = |why: String| Err(Error::invalid(format!("image {name}"), why));
        let Image { height, width, pixels } = image;
        let (Ok(h), Ok(w)) = (u32::try_from(*height), u32::try_from(*width)) else {
            return refused(format!("has {width} x {height} pixels, too many for a shard"));
        };
        if h.min(w) == 0 || Some(pixels.len()) != super::read::pixel_bytes(h, w) {
            return refused(format!("has {} bytes for {width} x {height} pixels", pixels.len()));
        }
        if label.is_some_and(|label| label >= self.set.classes.len()) {
            return refused(format!("has a label beyond the {} classes", self.set.classes.len()));
        }
        if self.entries.len() >= MAX_IMAGES as usize {
            return refused(format!("is one more than the {MAX_IMAGES} that a shard can hold"));
        }
        let zeros = [0; ALIGN as usize];
        let padding = &zeros[..pixels.len().next_multiple_of(zeros.len()) - pixels.len()];
        self.write(pixels)?;
        self.write(padding)?;
        self.entries.push(Entry {
            offset: self.offset,
            height: h,
            width: w,
            // Checked against the classes, whose names fit a file.
            label: label.map_or(NO_LABEL, |label| label as u32),
            crc: crc32c::crc32c_append(crc32c::crc32c(pixels), padding),
            name: name.into(),
        });
        self.offset += (pixels.len() + padding.len()) as u64;
        Ok(())
    }

    /// Notes a sample that could not be read.
    pub fn skip(&mut self, bad: BadImage) {
        self.skipped.push(bad);
    }

    /// Writes the index and the header, waits until all is on the disk, and gives the file its name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for names too long, [`Error::Io`] if it cannot be written.
    pub fn finish(mut self) -> Result<()> {
        let index = self.index();
        for (found, most, what) in [
            (index.len() as u64, MAX_INDEX_BYTES, "bytes of names"),
            (self.skipped.len() as u64, MAX_IMAGES.into(), "unreadable samples"),
            (self.set.classes.len() as u64, MAX_IMAGES.into(), "classes"),
        ] {
            if found > most {
                let why = format!("has {found} {what}, may have {most}; pack fewer images into it");
                return Err(Error::invalid("shard", why));
            }
        }
        let header = Header {
            side: self.set.side,
            interpolation: self.set.interpolation,
            shards: self.set.shards,
            number: self.number,
            fingerprint: self.set.fingerprint,
            first_sample: self.first_sample,
            index_offset: self.offset,
            index_bytes: index.len() as u64,
            images: self.entries.len() as u32,
            skipped: self.skipped.len() as u32,
            classes: self.set.classes.len() as u32,
            index_crc: crc32c::crc32c(&index),
        };
        self.write(&index)?;
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.write_all(&header.to_bytes()))
            .and_then(|()| self.file.flush())
            .and_then(|()| self.file.get_ref().sync_all())
            .and_then(|()| fs::rename(&self.aside, &self.path))
            .and_then(|()| sync_folder(&self.path))
            .map_err(Error::io("write", &self.path))?;
        self.finished = true;
        Ok(())
    }

    fn index(&self) -> Vec<u8> {
        let mut index = Vec::new();
        for entry in &self.entries {
            index.extend(entry.offset.to_le_bytes());
            for field in [entry.height, entry.width, entry.label, entry.crc] {
                index.extend(field.to_le_bytes());
            }
        }
        let text = |text: &str, index: &mut Vec<u8>| {
            index.extend((text.len() as u32).to_le_bytes());
            index.extend(text.as_bytes());
        };
        for entry in &self.entries {
            text(&entry.name, &mut index);
        }
        for class in &self.set.classes {
            text(class, &mut index);
        }
        for bad in &self.skipped {
            index.extend((bad.sample as u64).to_le_bytes());
            text(&bad.name, &mut index);
            text(&bad.reason, &mut index);
        }
        index
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.aside))
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if !self.finished {
            // What cannot be removed is only litter, and is overwritten by the next try.
            let _ = fs::remove_file(&self.aside);
        }
    }
}

/// A name is on the disk when its folder is. Only Unix opens folders.
fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if cfg!(unix) && !folder.as_os_str().is_empty() => {
            File::open(folder)?.sync_all()
        }
        _ => Ok(()),
    }
}
