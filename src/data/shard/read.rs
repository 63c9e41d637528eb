//! Reading shards: one file, and the set of them that a folder holds.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

use super::{
    ALIGN, Entry, Fields, HEADER_BYTES, Header, MAX_INDEX_BYTES, NO_LABEL, RECORD_BYTES, Set,
};
use crate::data::Image;
use crate::data::decode::MAX_ASPECT;
use crate::data::source::{self, BadImage};
use crate::{Error, Result};

/// What to do about a damaged shard.
const CURE: &str =
    "copy it again, or remove it and run pack_dataset as before: it packs only what is missing";

/// A packed shard, mapped into memory.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    /// Kept to see whether it was truncated since.
    file: File,
    map: Arc<Mmap>,
    /// All of `map`.
    bytes: Bytes,
    set: Set,
    number: u32,
    first_sample: u64,
    entries: Vec<Entry>,
    skipped: Vec<BadImage>,
}

impl Shard {
    /// Opens a shard and judges all of it but the pixels.
    ///
    /// The file must not be changed while it is open. One that is truncated is noticed by [`Shard::read`].
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is damaged or truncated, [`Error::Data`] if it cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |e| source::unreadable(path, &e);
        let damaged = |why: String| Error::corrupt(path, format!("{why}; {CURE}"));

        let mut file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut header = [0; HEADER_BYTES];
        if length < HEADER_BYTES as u64 {
            return Err(damaged(format!("it ends after {length} bytes, within its header")));
        }
        file.read_exact(&mut header).map_err(failed)?;
        let header = Header::from_bytes(&header).map_err(damaged)?;
        let should_be = header.index_offset.checked_add(header.index_bytes);
        if should_be != Some(length) {
            let should_be = should_be.map_or("more".into(), |bytes| bytes.to_string());
            return Err(damaged(format!("it has {length} bytes, should have {should_be}")));
        }
        if header.index_bytes > MAX_INDEX_BYTES {
            return Err(damaged(format!("its index has {} bytes", header.index_bytes)));
        }

        // Copied, not mapped: it is used long after it was judged.
        let mut index = vec![0; header.index_bytes as usize];
        file.seek(SeekFrom::Start(header.index_offset))
            .and_then(|_| file.read_exact(&mut index))
            .map_err(failed)?;
        if crc32c::crc32c(&index) != header.index_crc {
            return Err(damaged("its index is not what its checksum says".into()));
        }
        let (entries, classes, skipped) = parse(&index, &header).map_err(damaged)?;

        #[expect(unsafe_code, reason = "a mapped file is memory that others can change")]
        // SAFETY: the mapping belongs to this shard, which only reads it, as bytes, of which all values are valid. That
        // nobody changes the file meanwhile is the condition above; against it, `read` gives no image whose bytes are
        // not those of its checksum, and touches none beyond the file's present end.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        if map.len() as u64 != length {
            return Err(damaged("it was changed while it was opened".into()));
        }
        let map = Arc::new(map);
        let Header { side, interpolation, shards, number, fingerprint, first_sample, .. } = header;
        Ok(Self {
            path: path.into(),
            file,
            bytes: Bytes::from_owner(Mapped(Arc::clone(&map))),
            map,
            set: Set { shards, side, interpolation, fingerprint, classes },
            number,
            first_sample,
            entries,
            skipped,
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it has in common with the other shards of its set.
    #[must_use]
    pub fn set(&self) -> &Set {
        &self.set
    }

    /// Which shard of the set it is, from 0.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The samples of the source that it stands for: its images, and those that could not be read.
    #[must_use]
    pub fn samples(&self) -> std::ops::Range<u64> {
        let samples = (self.entries.len() + self.skipped.len()) as u64;
        self.first_sample..self.first_sample.saturating_add(samples)
    }

    /// Samples that could not be read when it was packed.
    #[must_use]
    pub fn skipped(&self) -> &[BadImage] {
        &self.skipped
    }

    /// Number of images; may be 0.
    #[expect(clippy::len_without_is_empty, reason = "no images are as good as some")]
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Name of an image in the source that was packed.
    ///
    /// # Panics
    /// If `image` is not below [`Shard::len`].
    #[must_use]
    pub fn name(&self, image: usize) -> &str {
        &self.entries[image].name
    }

    /// Class of an image, an index into those of [`Shard::set`].
    ///
    /// # Panics
    /// If `image` is not below [`Shard::len`].
    #[must_use]
    pub fn label(&self, image: usize) -> Option<usize> {
        let label = self.entries[image].label;
        (label != NO_LABEL).then_some(label as usize)
    }

    pub(super) fn crc(&self, image: usize) -> u32 {
        self.entries[image].crc
    }

    /// An image: a view of the mapped file, whose checksum was compared.
    ///
    /// # Errors
    /// Why it cannot be had: the file is damaged, or was truncated since it was opened.
    ///
    /// # Panics
    /// If `image` is not below [`Shard::len`].
    pub fn read(&self, image: usize) -> Result<Image, String> {
        let Entry { offset, height, width, crc, .. } = self.entries[image];
        let file = self.path.file_name().unwrap_or_default().display();
        let bytes = pixel_bytes(height, width).expect("judged when the shard was opened");
        let start = usize::try_from(offset).expect("within the mapping");
        let end = start + bytes;
        let padded = end.next_multiple_of(ALIGN as usize);
        // Beyond the end of a file its mapping kills the process that touches it.
        let length =
            self.file.metadata().map_err(|e| format!("{file} cannot be read ({e})"))?.len();
        if length < padded as u64 {
            return Err(format!("{file} was truncated to {length} bytes; {CURE}"));
        }
        // Without it the pixels of a cold file come a few pages at a time, which took more than twice as long; of one in memory
        // it costs microseconds. A kernel that does not listen only takes longer.
        #[cfg(unix)]
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, start, padded - start);
        if crc32c::crc32c(&self.bytes[start..padded]) != crc {
            return Err(format!(
                "{file} is damaged: pixels are not what their checksum says; {CURE}"
            ));
        }
        Ok(Image {
            height: height as usize,
            width: width as usize,
            pixels: self.bytes.slice(start..end),
        })
    }
}

/// A share of the mapping, as the owner of bytes.
struct Mapped(Arc<Mmap>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// `height * width * 3`, if an image may have this size: no side is 0, none 100 times the other.
pub(super) fn pixel_bytes(height: u32, width: u32) -> Option<usize> {
    let (short, long) = (height.min(width) as usize, height.max(width) as usize);
    if short == 0 || long > short.checked_mul(MAX_ASPECT)? {
        return None;
    }
    short.checked_mul(long)?.checked_mul(3)
}

/// What an index holds; what is wrong with it, if something is.
type Index = (Vec<Entry>, Vec<String>, Vec<BadImage>);

fn parse(index: &[u8], header: &Header) -> Result<Index, String> {
    const SHORT: &str = "its index ends too early, or has a name that is not UTF-8";
    // Before memory is taken for them.
    let least = header.images as u64 * (RECORD_BYTES as u64 + 4)
        + header.classes as u64 * 4
        + header.skipped as u64 * 16;
    if least > index.len() as u64 {
        return Err(SHORT.into());
    }
    let mut fields = Fields(index);
    let mut entries = Vec::with_capacity(header.images as usize);
    let mut end = HEADER_BYTES as u64;
    for image in 0..header.images {
        let entry = (|| {
            Some(Entry {
                offset: fields.u64()?,
                height: fields.u32()?,
                width: fields.u32()?,
                label: fields.u32()?,
                crc: fields.u32()?,
                name: "".into(),
            })
        })();
        let entry = entry.ok_or(SHORT)?;
        if entry.offset != end {
            return Err(format!("image {image} is at {}, should be at {end}", entry.offset));
        }
        if entry.label != NO_LABEL && entry.label >= header.classes {
            return Err(format!("image {image} has label {} of {}", entry.label, header.classes));
        }
        end = pixel_bytes(entry.height, entry.width)
            .and_then(|bytes| end.checked_add(bytes as u64)?.checked_next_multiple_of(ALIGN))
            .filter(|end| *end <= header.index_offset)
            .ok_or_else(|| {
                format!("image {image} has {} x {} pixels", entry.width, entry.height)
            })?;
        entries.push(entry);
    }
    if end != header.index_offset {
        return Err(format!("its images end at {end}, its index is at {}", header.index_offset));
    }
    for entry in &mut entries {
        entry.name = fields.text().ok_or(SHORT)?.into();
    }
    let mut classes = Vec::with_capacity(header.classes as usize);
    for _ in 0..header.classes {
        classes.push(fields.text().ok_or(SHORT)?.into());
    }
    let mut skipped = Vec::with_capacity(header.skipped as usize);
    for _ in 0..header.skipped {
        let bad = (|| {
            let sample = usize::try_from(fields.u64()?).ok()?;
            Some(BadImage { sample, name: fields.text()?.into(), reason: fields.text()?.into() })
        })();
        skipped.push(bad.ok_or(SHORT)?);
    }
    if !fields.0.is_empty() {
        return Err(format!("its index has {} bytes too many", fields.0.len()));
    }
    Ok((entries, classes, skipped))
}

/// The shards of a set.
#[derive(Debug)]
pub struct Shards {
    path: PathBuf,
    shards: Vec<Shard>,
    /// First image of each shard.
    first: Vec<usize>,
    len: usize,
}

impl Shards {
    /// Opens the set that `files` are, in the order of their names.
    pub(in crate::data) fn open(path: &Path, files: &[PathBuf]) -> Result<Self> {
        let shards = files.iter().map(|file| Shard::open(file)).collect::<Result<Vec<_>>>()?;
        let set = shards[0].set();
        let mut first = Vec::with_capacity(shards.len());
        let (mut len, mut samples) = (0, 0);
        for (i, shard) in shards.iter().enumerate() {
            if shard.set() != set {
                return Err(Error::data(
                    path,
                    format!(
                        "holds shards of two sets, to which {} and {} belong; \
                         give each set a folder of its own",
                        files[0].display(),
                        files[i].display()
                    ),
                ));
            }
            if shard.number() as usize != i {
                return Err(Error::data(
                    path,
                    format!(
                        "lacks shard {i} of {}, or {} has another name than it was given; {CURE}",
                        set.shards,
                        files[i].display()
                    ),
                ));
            }
            if shard.samples().start != samples {
                return Err(Error::corrupt(
                    &files[i],
                    format!(
                        "it begins with sample {}, the shard before it ends with {samples}; {CURE}",
                        shard.samples().start
                    ),
                ));
            }
            samples = shard.samples().end;
            first.push(len);
            len += shard.len();
        }
        if shards.len() != set.shards as usize {
            return Err(Error::data(
                path,
                format!("lacks shard {} of {}; {CURE}", shards.len(), set.shards),
            ));
        }
        if len == 0 {
            return Err(Error::data(path, "holds shards without images; pack others"));
        }
        Ok(Self { path: path.into(), shards, first, len })
    }

    pub(in crate::data) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::data) fn len(&self) -> usize {
        self.len
    }

    pub(in crate::data) fn name(&self, sample: usize) -> String {
        let (shard, image) = self.place(sample);
        shard.name(image).to_owned()
    }

    pub(in crate::data) fn label(&self, sample: usize) -> Option<usize> {
        let (shard, image) = self.place(sample);
        shard.label(image)
    }

    /// What all shards have in common.
    pub(in crate::data) fn set(&self) -> &Set {
        &self.shards[0].set
    }

    pub(in crate::data) fn classes(&self) -> &[String] {
        &self.set().classes
    }

    pub(in crate::data) fn crc(&self, sample: usize) -> u32 {
        let (shard, image) = self.place(sample);
        shard.crc(image)
    }

    pub(in crate::data) fn read(&self, sample: usize) -> Result<Image, String> {
        let (shard, image) = self.place(sample);
        shard.read(image)
    }

    /// The shard that holds a sample, and which of its images that is.
    fn place(&self, sample: usize) -> (&Shard, usize) {
        assert!(sample < self.len);
        // The last that begins at or before it; of shards without images only the last of a row can be that.
        let at = self.first.partition_point(|first| *first <= sample) - 1;
        (&self.shards[at], sample - self.first[at])
    }
}
